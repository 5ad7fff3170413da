/* The last line of a build: see summary.h.
 *
 * Runs inside a program that is about to end, with its atexit() functions behind it: no stdio, no allocation,
 * nothing that could change how it ends, and two seconds at most.
 */
#define _GNU_SOURCE
#include "summary.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "wrapper_protocol.h"

#define PREFIX "termite: "
#define LONGEST_LINE 4096

static pid_t topmost; /* 0: this process is not the topmost of a build */
static char path[PATH_MAX];

void remember_build(void) {
    const char *token = getenv("TERMITE_BUILD"), *named = getenv("TERMITE_SOCKET");
    topmost = 0;
    if (!token || !named || *named != '/' || strlen(named) >= sizeof path) return;
    if (strtol(token, NULL, 10) != getpid()) return;
    strcpy(path, named);
    topmost = getpid();
}

static int connected(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {.tv_sec = 2};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), directory = -1;
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (strlen(path) < sizeof address.sun_path) {
        strcpy(address.sun_path, path);
    } else { /* too long for an address: by way of its directory */
        char *slash = strrchr(path, '/');
        *slash = 0;
        directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", directory, slash + 1);
    }
    int failed = connect(fd, (struct sockaddr *)&address, sizeof address);
    if (directory >= 0) close(directory);
    if (!failed) return fd;
    close(fd);
    return -1;
}

static char *put_u32(char *at, uint32_t value) {
    for (int i = 0; i < 4; i++) at[i] = (char)(value >> 8 * i);
    return at + 4;
}

static bool ask(int fd) {
    char request[128] = WRAPPER_MAGIC, *at = request + 8;
    at = put_u32(at, REQUEST_SUMMARY);
    at = put_u32(at, 0);
    at = put_u32(at, 0);
    at = put_u32(at, 1);
    memcpy(at, "/\0\0", 4); /* cwd, no program, no worker */
    at += 4;
    at += snprintf(at, request + sizeof request - at, "TERMITE_BUILD=%d", (int)topmost) + 1;
    put_u32(request + 4, (uint32_t)(at - request - 8));
    return send(fd, request, at - request, MSG_NOSIGNAL) == at - request;
}

static bool get(int fd, void *into, size_t count) {
    return recv(fd, into, count, MSG_WAITALL) == (ssize_t)count;
}

void print_summary(void) {
    unsigned char head[FRAME_HEADER];
    char line[sizeof PREFIX + LONGEST_LINE] = PREFIX;
    sigset_t pipe;
    if (!topmost || topmost != getpid()) return;
    int fd = connected();
    if (fd < 0) return;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE); /* a reader of our stderr that is gone must not decide how make ends */
    sigprocmask(SIG_BLOCK, &pipe, NULL);
    if (ask(fd)) {
        while (get(fd, head, sizeof head) && head[0] == FRAME_MESSAGE) {
            uint32_t length = head[1] | head[2] << 8 | head[3] << 16 | (uint32_t)head[4] << 24;
            char *text = line + sizeof PREFIX - 1;
            if (length > LONGEST_LINE || !get(fd, text, length)) break;
            text[length] = '\n';
            if (write(STDERR_FILENO, line, sizeof PREFIX + length) < 0) break;
        }
    }
    close(fd);
}
