/* Running a command in place of this process, and the few words and helpers all of them share; see inplace.h. */
#define _GNU_SOURCE
#include "inplace.h"
#include "wrapper_protocol.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- words and memory ---------------------------------------------------------------------- */

static void vcomplain(const char *format, va_list args) {
    char line[2 * PATH_MAX];
    int start = snprintf(line, sizeof line, "termite: ");
    int length = vsnprintf(line + start, sizeof line - start - 1, format, args);
    size_t end = start + (length < 0 ? 0 : (size_t)length);
    if (end > sizeof line - 2) end = sizeof line - 2;
    line[end++] = '\n';
    if (write(STDERR_FILENO, line, end) < 0) { /* nobody to tell */
    }
}

void complain(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vcomplain(format, args);
    va_end(args);
}

void fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vcomplain(format, args);
    va_end(args);
    exit(status);
}

void *allocate(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) fail(1, "out of memory");
    return memory;
}

const char *setting(char **env, const char *name) {
    size_t length = strlen(name);
    for (; *env; env++)
        if (!strncmp(*env, name, length) && (*env)[length] == '=') return (*env)[length + 1] ? *env + length + 1 : NULL;
    return NULL;
}

char *joined(const char *directory, size_t length, const char *name) {
    char *path = allocate(length + strlen(name) + 2);
    memcpy(path, directory, length);
    path[length] = '/';
    strcpy(path + length + 1, name);
    return path;
}

/* ---- executing in place -------------------------------------------------------------------- */

const char *interposer_in(const char *list, size_t *length) {
    for (const char *at = list; *at; at += *length) {
        if (strchr(" :", *at)) {
            *length = 1;
            continue;
        }
        *length = strcspn(at, " :");
        size_t name = strlen(INTERPOSER_NAME);
        if (*length >= name && !strncmp(at + *length - name, INTERPOSER_NAME, name) &&
            (*length == name || at[*length - name - 1] == '/'))
            return at;
    }
    return NULL;
}

char *without_interposer(const char *list) {
    char *rest = strdup(list);
    const char *entry;
    size_t length;
    if (!rest) fail(1, "out of memory");
    while ((entry = interposer_in(rest, &length))) {
        char *from = rest + (entry - rest);
        char *to = from + length;
        to += strspn(to, " :");
        memmove(from, to, strlen(to) + 1);
    }
    for (size_t last = strlen(rest); last && strchr(" :", rest[last - 1]);) rest[--last] = 0;
    return rest;
}

/* execve(2), and what the kernel does not know: a script without #! is the shell's. */
static void try(const char *path, char **argv, char **env) {
    execve(path, argv, env);
    if (errno != ENOEXEC) return;
    size_t argc = 0;
    while (argv[argc]) argc++;
    char **script = allocate((argc + 3) * sizeof *script);
    script[0] = "/bin/sh";
    script[1] = (char *)path;
    if (argc) memcpy(script + 2, argv + 1, argc * sizeof *argv);
    else script[2] = NULL;
    execve(script[0], script, env);
    free(script);
}

int execute(const char *program, char **argv, char **env) {
    if (strchr(program, '/')) {
        try(program, argv, env);
        return errno;
    }
    const char *path = setting(env, "PATH");
    int error = ENOENT;
    if (!path) path = "/bin:/usr/bin";
    if (!*program) return ENOENT;
    for (const char *directory = path;; directory++) {
        size_t length = strcspn(directory, ":");
        char *candidate = length ? joined(directory, length, program) : joined(".", 1, program);
        try(candidate, argv, env);
        free(candidate);
        if (errno == EACCES) error = EACCES;
        else if (errno != ENOENT && errno != ENOTDIR) return errno;
        directory += length;
        if (!*directory) return error;
    }
}
