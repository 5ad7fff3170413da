/* How mkbox speaks: one line at a time, with what failed, on which path, and what to do about it. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void write_all(int fd, const void *bytes, size_t left)
{
    for (const char *at = bytes; left > 0;) {
        ssize_t n = write(fd, at, left);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return; /* nobody is left who could be told */
        at += n;
        left -= n;
    }
}

void write_line(int fd, const char *text)
{
    char line[LINE_BYTES + 8];
    size_t n = 0;
    for (const unsigned char *c = (const unsigned char *)text; *c && n < LINE_BYTES; c++)
        if (*c < ' ' || *c == 127)
            n += sprintf(line + n, "\\x%02x", *c);
        else
            line[n++] = *c;
    line[n++] = '\n';
    write_all(fd, line, n);
}

const char *advice(int error)
{
    switch (error) {
    case EPERM:
        return "; making a box needs root (CAP_SYS_ADMIN) and, in a container, the permission to mount";
    case ENOSYS:
        return "; this needs Linux 5.12 or newer and no seccomp filter that forbids it";
    case ENODEV:
        return "; the kernel lacks this file system: try modprobe overlay";
    case ENOSPC:
        return "; see sysctl fs.mount-max and user.max_mnt_namespaces, user.max_pid_namespaces, or the disk is full";
    case EROFS:
        return "; the root of a template is read-only: make it with the template (-D)";
    default:
        return "";
    }
}

/* Init's end also ends the outer process, with the same exit status. */
_Noreturn void fail(int error, const char *format, ...)
{
    char text[LINE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int n = snprintf(text, sizeof text, "mkbox: ");
    n += vsnprintf(text + n, sizeof text - n, format, arguments);
    va_end(arguments);
    if (error && n < LINE_BYTES)
        snprintf(text + n, sizeof text - n, ": %s%s", strerror(error), advice(error));
    write_line(opt.error_fd, text);
    _exit(EXIT_BOX);
}

_Noreturn void usage(const char *format, ...)
{
    char text[LINE_BYTES] = "mkbox: ";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + 7, sizeof text - 7, format, arguments);
    va_end(arguments);
    strncat(text, " (mkbox --help explains)", sizeof text - strlen(text) - 1);
    write_line(STDERR_FILENO, text);
    exit(EXIT_USAGE);
}
