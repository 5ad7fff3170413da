/* The server: one process that makes box after box, so that no command pays for starting a program.

   It reads packets from a SOCK_SEQPACKET socket:

     'R', u32 id, NUL-terminated strings    run a box: the strings are mkbox's arguments, argv[0] first;
                                            with SCM_RIGHTS its descriptors, see below
     'K', u32 id                            kill that box; no effect if it has ended

   and answers only what it could not do: 'E', u32 id, text.  How the box fares is told through the box's own
   --status-fd and --error-fd.  Numbers are little endian.  When the socket ends, so do all boxes, then the server.

   Descriptors go where they are wanted by themselves, because the kernel fills the lowest free numbers:
   the server keeps 0, 1 and 2 free, and 3 to 9 occupied (all are a pidfd of itself), so what a packet
   brings becomes 0, 1, 2, 10, 11, ... in that order, and a fork has them all in their places.

     0 1 2  10..99   of the box that is being started
     3..9            this process, for init to see whether it lives
     100..199        inherited from whoever started the server; all boxes may name them
     200..           the server's own, closed in init: its socket, and two of each box that lives

   The server makes no box itself: a fork of it does, as process 1 of a new PID namespace.  So whatever
   a box's arguments lead to, the server is out of its reach. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { STANDARD = 3, SELF = 3, FIRST_PASSED = 10, LAST_PASSED = 99, OWN = 200 };
enum { MAX_PASSED = STANDARD + LAST_PASSED - FIRST_PASSED + 1, MAX_BOXES = 1024 };
enum { HEADER = 5, PACKET_BYTES = 256 * 1024 };

/* Everything that changes is together: each fork makes the kernel copy every page that is written after it. */
static struct {
    int socket, box_count;
    struct box {
        uint32_t id;
        int pidfd;
        int status_fd; /* kept until the box is reaped, so that its end means: nothing is left; -1: none */
    } boxes[MAX_BOXES];
} server;

static char packet[PACKET_BYTES + 1]; /* one more, to see that a packet was too long */

static void __attribute__((format(printf, 2, 3))) refuse(uint32_t id, const char *format, ...)
{
    char answer[HEADER + 512] = {'E', id, id >> 8, id >> 16, id >> 24};
    va_list values;
    va_start(values, format);
    vsnprintf(answer + HEADER, sizeof answer - HEADER, format, values);
    va_end(values);
    send(server.socket, answer, HEADER + strlen(answer + HEADER), MSG_DONTWAIT | MSG_NOSIGNAL);
}

static int own(int fd)
{
    return fcntl(fd, F_DUPFD_CLOEXEC, OWN);
}

static void close_passed(void)
{
    close_range(0, STANDARD - 1, 0);
    close_range(FIRST_PASSED, LAST_PASSED, 0);
}

/* NULL if it does not live. */
static struct box *find(uint32_t id)
{
    for (struct box *box = server.boxes; box < server.boxes + server.box_count; box++)
        if (box->id == id)
            return box;
    return NULL;
}

static void kill_box(const struct box *box)
{
    syscall(SYS_pidfd_send_signal, box->pidfd, SIGKILL, NULL, 0);
}

/* The last one takes its place. */
static void reap(struct box *box)
{
    siginfo_t how;
    while (waitid(P_PIDFD, box->pidfd, &how, WEXITED) < 0 && errno == EINTR)
        ;
    close(box->pidfd);
    if (box->status_fd >= 0)
        close(box->status_fd);
    *box = server.boxes[--server.box_count];
}

/* Nothing is guessed wrong here that would matter: at worst, a descriptor is held until the box has ended. */
static int status_fd_in(char *at, const char *end)
{
    while (at < end && strcmp(at, "--")) {
        bool found = !strcmp(at, "--status-fd");
        at += strlen(at) + 1;
        if (found && at < end)
            return atoi(at);
    }
    return -1;
}

static _Noreturn void become_init(char *at, const char *end)
{
    int count = 0;
    close_range(OWN, ~0U, 0);
    starter_pidfd = SELF;
    for (const char *word = at; word < end; word += strlen(word) + 1)
        count++;
    char *arguments[count + 1];
    for (int i = 0; i < count; at += strlen(at) + 1)
        arguments[i++] = at;
    arguments[count] = NULL;
    parse_options(count, arguments);
    if (opt.serve_fd >= 0 || opt.hold || opt.explain)
        usage("--serve, --hold and --explain are not for a box that is served");
    build_plan();
    make_box();
}

/* As fork() would, but the child is process 1 of a new PID namespace and the parent has a pidfd of it. */
static pid_t fork_init(int *pidfd)
{
    return syscall(SYS_clone, CLONE_NEWPID | CLONE_PIDFD | SIGCHLD, NULL, pidfd, NULL, NULL);
}

static void run(uint32_t id, char *at, const char *end)
{
    if (server.box_count == MAX_BOXES) {
        refuse(id, "%d boxes are running, and more cannot be", MAX_BOXES);
        return;
    }
    if (find(id)) {
        refuse(id, "a box of this id is running");
        return;
    }
    int pidfd, status_fd = status_fd_in(at, end);
    pid_t pid = fork_init(&pidfd);
    if (pid == 0)
        become_init(at, end);
    if (pid < 0) {
        refuse(id, "cannot start process 1 of the box: %s", strerror(errno));
        return;
    }
    struct box *box = &server.boxes[server.box_count++];
    *box = (struct box){id, own(pidfd), status_fd >= 0 ? own(status_fd) : -1};
    if (box->pidfd >= 0) {
        close(pidfd);
        return;
    }
    refuse(id, "cannot watch the box: %s", strerror(errno)); /* so it could be neither killed nor reaped later */
    box->pidfd = pidfd;
    kill_box(box);
    reap(box);
}

/* NULL if the descriptors are where this file's first lines say. */
static const char *complaint(struct msghdr *message)
{
    struct cmsghdr *rights = CMSG_FIRSTHDR(message);
    if (message->msg_flags & MSG_CTRUNC)
        return "too many descriptors";
    if (!rights || rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS)
        return "no descriptors: standard input, output and error are needed at least";
    int count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    int last, expected = count <= STANDARD ? count - 1 : FIRST_PASSED + count - STANDARD - 1;
    memcpy(&last, CMSG_DATA(rights) + (count - 1) * sizeof(int), sizeof last);
    if (count < STANDARD)
        return "too few descriptors: standard input, output and error are needed at least";
    return last == expected ? NULL : "descriptors have come to unexpected places";
}

static void kill_by_id(uint32_t id)
{
    const struct box *box = find(id);
    if (box)
        kill_box(box);
}

/* false: nobody is there any more. */
static bool handle_packet(void)
{
    union {
        char bytes[CMSG_SPACE(MAX_PASSED * sizeof(int))];
        struct cmsghdr aligned;
    } control;
    struct iovec piece = {packet, sizeof packet};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1,
                             .msg_control = &control, .msg_controllen = CMSG_LEN(MAX_PASSED * sizeof(int))};
    ssize_t size = recvmsg(server.socket, &message, 0);
    if (size <= 0)
        return size < 0 && errno == EINTR;
    const unsigned char *id_bytes = (unsigned char *)packet + 1;
    uint32_t id = size < HEADER ? 0
        : id_bytes[0] | id_bytes[1] << 8 | id_bytes[2] << 16 | (uint32_t)id_bytes[3] << 24;
    const char *wrong;
    if (message.msg_flags & MSG_TRUNC || size > PACKET_BYTES)
        refuse(id, "the packet is longer than %d bytes", PACKET_BYTES);
    else if (size == HEADER && packet[0] == 'K')
        kill_by_id(id);
    else if (size <= HEADER || packet[0] != 'R' || packet[size - 1])
        refuse(id, "not a packet that mkbox knows");
    else if ((wrong = complaint(&message)))
        refuse(id, "%s", wrong);
    else
        run(id, packet + HEADER, packet + size);
    if (message.msg_controllen)
        close_passed();
    return true;
}

static void arrange_descriptors(int socket)
{
    int type = 0, self = syscall(SYS_pidfd_open, getpid(), 0);
    socklen_t size = sizeof type;
    if (getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &size) < 0 || type != SOCK_SEQPACKET)
        usage("--serve %d: not a SOCK_SEQPACKET socket", socket);
    server.socket = own(socket);
    if (self < 0 || server.socket < 0 || (self = own(self)) < 0)
        fail(errno, "cannot arrange the descriptors of the server");
    close(socket);
    close_range(0, LAST_PASSED, 0);
    for (int fd = SELF; fd < FIRST_PASSED; fd++)
        dup2(self, fd);
    close(self);
}

/* Packets first: somebody waits for what they bring. */
static bool serve_once(void)
{
    int count = server.box_count;
    struct pollfd watched[1 + count];
    watched[count] = (struct pollfd){.fd = server.socket, .events = POLLIN};
    for (int i = 0; i < count; i++)
        watched[i] = (struct pollfd){.fd = server.boxes[i].pidfd, .events = POLLIN};
    if (poll(watched, 1 + count, -1) < 0)
        return true;
    bool more = !watched[count].revents || handle_packet();
    for (int i = count - 1; i >= 0; i--) /* backwards: reap() moves the last one */
        if (watched[i].revents)
            reap(&server.boxes[i]);
    return more;
}

_Noreturn void serve(int socket)
{
    drop_bounding_set();
    arrange_descriptors(socket);
    while (serve_once())
        ;
    for (int i = 0; i < server.box_count; i++)
        kill_box(&server.boxes[i]);
    while (server.box_count)
        reap(server.boxes);
    _exit(0);
}
