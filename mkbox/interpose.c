/* libtermite-interpose.so: inside make and ninja, every command becomes a termite-shell-wrapper.
 *
 * Preloaded (LD_PRELOAD) by termite-make and termite-run.  It replaces what these tools start commands
 * with, so that `PROGRAM ARGV...` becomes `$TERMITE_WRAPPER -exec -- PROGRAM ARGV...`.  The makefile's SHELL,
 * .SHELLFLAGS and .ONESHELL, the environment and all descriptors stay as they are.
 *
 * In the topmost program of a build it also prints, at that program's end, what the build came to (summary.c).
 *
 * In every other program that inherits it, and without TERMITE_WRAPPER, it does nothing.  Nor when
 * - a process executes something in place of itself (make that starts over after remaking a makefile);
 * - the program cannot be executed: make then reports that in its own words.
 *
 * The output of $(shell ...) and != is part of reading a makefile: it is wanted now, one after the other, so
 * these commands run here (`-local`).  Such a command is known by its stdout: a pipe into make itself.
 * A recipe's stdout is make's own, or with --output-sync a file.
 *
 * The exec functions may run in a child of vfork(), on the parent's memory: no allocation, no stdio there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "summary.h"

enum tool {
    OTHER,
    MAKE,  /* spawns or forks; has $(shell) */
    NINJA, /* spawns its commands; what it executes in a fork is a tool of its own */
    NAMED, /* by TERMITE_TOOLS: spawns or forks */
};

static const struct {
    const char *name;
    enum tool tool;
} TOOLS[] = {
    {"make", MAKE},   {"gmake", MAKE},       {"termite-make", MAKE},
    {"ninja", NINJA}, {"ninja-build", NINJA}, {"samu", NINJA},
};

static enum tool tool;       /* what this process is; OTHER: hands off */
static const char *wrapper;  /* what it runs commands with */
static pid_t self;           /* of the tool itself; its children have another before they exec */
static struct stat own_stdout;

typedef int dup2_function(posix_spawn_file_actions_t *, int, int);
typedef int init_function(posix_spawn_file_actions_t *);
typedef int spawn_function(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,
                           char *const[], char *const[]);
typedef int exec_function(const char *, char *const[], char *const[]);

static struct {
    init_function *actions_init;
    dup2_function *adddup2;
    spawn_function *spawn, *spawnp;
    exec_function *execve, *execvpe;
} libc;

/* The last descriptor that a spawn was told to have as stdout, and where that was noted; -1: its parent's. */
static const posix_spawn_file_actions_t *noted_actions;
static int noted_stdout = -1;

/* Once, at the start: a child of fork() or vfork() must not take the dynamic linker's locks. */
static void find_libc(void) {
    if (libc.execvpe) return;
    libc.actions_init = (init_function *)dlsym(RTLD_NEXT, "posix_spawn_file_actions_init");
    libc.adddup2 = (dup2_function *)dlsym(RTLD_NEXT, "posix_spawn_file_actions_adddup2");
    libc.spawn = (spawn_function *)dlsym(RTLD_NEXT, "posix_spawn");
    libc.spawnp = (spawn_function *)dlsym(RTLD_NEXT, "posix_spawnp");
    libc.execve = (exec_function *)dlsym(RTLD_NEXT, "execve");
    libc.execvpe = (exec_function *)dlsym(RTLD_NEXT, "execvpe");
}

/* ---- who are we? --------------------------------------------------------------------------- */

static bool listed(const char *list, const char *name) {
    size_t length = strlen(name);
    while (list && *list) {
        size_t entry = strcspn(list, " :,");
        if (entry == length && !strncmp(list, name, length)) return true;
        list += entry + (list[entry] != 0);
    }
    return false;
}

static enum tool tool_named(const char *name) {
    for (size_t i = 0; i < sizeof TOOLS / sizeof *TOOLS; i++)
        if (!strcmp(TOOLS[i].name, name)) return TOOLS[i].tool;
    return listed(getenv("TERMITE_TOOLS"), name) ? NAMED : OTHER;
}

static enum tool which_tool(void) {
    char path[PATH_MAX];
    enum tool found = tool_named(program_invocation_short_name);
    if (found != OTHER) return found;
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length <= 0) return OTHER;
    path[length] = 0;
    return tool_named(strrchr(path, '/') + 1);
}

/* A make that was not started as termite-make (by cmake --build, by a script) takes that name, so that
 * $(MAKE) is termite-make and its recursive makes are known as such. */
__attribute__((constructor)) static void load(int argc, char **argv, char **envp) {
    (void)envp;
    find_libc();
    wrapper = getenv("TERMITE_WRAPPER");
    if (!wrapper || !*wrapper) return;
    remember_build();
    tool = which_tool();
    self = getpid();
    if (fstat(STDOUT_FILENO, &own_stdout)) own_stdout.st_ino = 0;
    if (tool == MAKE && argc > 0) argv[0] = "termite-make";
}

/* However it ends by itself; a program that is killed says nothing, and the master logs the line. */
__attribute__((destructor)) static void unload(void) {
    print_summary();
}

/* ---- the command instead of which the wrapper runs ------------------------------------------ */

/* The file that PROGRAM means, if it can be executed; SEARCH: on PATH, unless it has a slash. */
static const char *executable(const char *program, bool search, char *found) {
    if (!search || strchr(program, '/')) return access(program, X_OK) ? NULL : program;
    const char *path = getenv("PATH");
    if (!path) path = "/bin:/usr/bin";
    for (;; path++) {
        size_t length = strcspn(path, ":"), name = strlen(program);
        if (length + name + 2 < PATH_MAX) {
            char *end = mempcpy(found, path, length);
            if (length) *end++ = '/';
            memcpy(end, program, name + 1);
            if (!access(found, X_OK)) return found;
        }
        path += length;
        if (!*path) return NULL;
    }
}

static size_t length_of(char *const *argv) {
    size_t count = 0;
    while (argv[count]) count++;
    return count;
}

#define WRAPPED(argv) (length_of(argv) + 5)

/* Fills INTO, which has room for WRAPPED(argv) pointers. */
static void wrap(const char **into, bool local, const char *path, char *const *argv) {
    *into++ = wrapper;
    *into++ = local ? "-local" : "-exec";
    *into++ = "--";
    *into++ = path;
    memcpy(into, argv, (length_of(argv) + 1) * sizeof *argv);
}

/* Is a command with this stdout one of $(shell)? */
static bool feeds_make(int out) {
    struct stat st;
    if (tool != MAKE || out < 0 || fstat(out, &st) || !S_ISFIFO(st.st_mode)) return false;
    return st.st_dev != own_stdout.st_dev || st.st_ino != own_stdout.st_ino;
}

/* ---- posix_spawn: make from 4.3 on, ninja, samurai ------------------------------------------ */

int posix_spawn_file_actions_init(posix_spawn_file_actions_t *actions) {
    find_libc();
    if (actions == noted_actions) noted_actions = NULL;
    return libc.actions_init(actions);
}

int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t *actions, int fd, int to) {
    find_libc();
    if (to == STDOUT_FILENO) {
        noted_actions = actions;
        noted_stdout = fd;
    }
    return libc.adddup2(actions, fd, to);
}

static int spawn(bool search, pid_t *pid, const char *program, const posix_spawn_file_actions_t *actions,
                 const posix_spawnattr_t *attributes, char *const argv[], char *const envp[]) {
    char found[PATH_MAX];
    find_libc();
    int out = actions && actions == noted_actions ? noted_stdout : -1;
    const char *path = tool == OTHER || !argv[0] ? NULL : executable(program, search, found);
    if (!path) return (search ? libc.spawnp : libc.spawn)(pid, program, actions, attributes, argv, envp);
    const char **wrapped = alloca(WRAPPED(argv) * sizeof *wrapped);
    wrap(wrapped, feeds_make(out), path, argv);
    return libc.spawn(pid, wrapper, actions, attributes, (char *const *)wrapped, envp);
}

int posix_spawn(pid_t *pid, const char *program, const posix_spawn_file_actions_t *actions,
                const posix_spawnattr_t *attributes, char *const argv[], char *const envp[]) {
    return spawn(false, pid, program, actions, attributes, argv, envp);
}

int posix_spawnp(pid_t *pid, const char *program, const posix_spawn_file_actions_t *actions,
                 const posix_spawnattr_t *attributes, char *const argv[], char *const envp[]) {
    return spawn(true, pid, program, actions, attributes, argv, envp);
}

/* ---- exec in a forked child: make up to 4.2, or built without posix_spawn -------------------- */

static int replace(bool search, const char *program, char *const argv[], char *const envp[]) {
    char found[PATH_MAX];
    find_libc();
    bool command = (tool == MAKE || tool == NAMED) && getpid() != self && argv[0];
    const char *path = command ? executable(program, search, found) : NULL;
    if (!path) return (search ? libc.execvpe : libc.execve)(program, argv, envp);
    const char **wrapped = alloca(WRAPPED(argv) * sizeof *wrapped);
    wrap(wrapped, feeds_make(STDOUT_FILENO), path, argv);
    return libc.execve(wrapper, (char *const *)wrapped, envp);
}

int execve(const char *path, char *const argv[], char *const envp[]) {
    return replace(false, path, argv, envp);
}

int execv(const char *path, char *const argv[]) {
    return replace(false, path, argv, environ);
}

int execvpe(const char *file, char *const argv[], char *const envp[]) {
    return replace(true, file, argv, envp);
}

int execvp(const char *file, char *const argv[]) {
    return replace(true, file, argv, environ);
}

/* ARGV: FIRST and what follows it up to the NULL, on the caller's stack; REST is left behind that NULL. */
#define COLLECT(first, argv, rest)                                            \
    va_list rest;                                                             \
    size_t count = 0;                                                         \
    va_start(rest, first);                                                    \
    for (const char *arg = first; arg; arg = va_arg(rest, char *)) count++;   \
    va_end(rest);                                                             \
    char **argv = alloca((count + 1) * sizeof *argv);                         \
    va_start(rest, first);                                                    \
    argv[0] = (char *)first;                                                  \
    for (size_t i = 1; i <= count; i++) argv[i] = va_arg(rest, char *)

int execl(const char *path, const char *first, ...) {
    COLLECT(first, argv, rest);
    va_end(rest);
    return execv(path, argv);
}

int execlp(const char *file, const char *first, ...) {
    COLLECT(first, argv, rest);
    va_end(rest);
    return execvp(file, argv);
}

int execle(const char *path, const char *first, ...) {
    COLLECT(first, argv, rest);
    char *const *envp = va_arg(rest, char *const *);
    va_end(rest);
    return execve(path, argv, envp);
}
