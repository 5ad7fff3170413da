/* mkbox makes a box for one command, runs the command in it, and leaves nothing behind.

   It goes in this order, and so do its files (options, plan, steps, and here the processes):

     options -> plan -> (--explain prints the plan and stops)
             -> HERE      what must be fetched while the caller's files are still in sight
             -> INSIDE    new namespaces, then every mount, one step after the other
             -> AS_INIT   process 1 of the box: /proc, limits, and giving up every privilege
             -> the command, until it ends; then everything it left behind is killed

   Three processes take part.  The first one (outer) stays root, waits and reports.  Its child is
   process 1 of the box (init); it shares the outer one's memory, so that starting it copies nothing
   and its report needs no pipe.  Init's child becomes the command.

   This program runs once per remote command, so a system call that can be spared is spared: mount
   points are created only after mounting has failed for want of one. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Init writes it, the outer process, whose memory it is, reads it when init has ended. */
static struct {
    bool valid;
    int status;
    uint64_t cpu_us;
} report;

static int outer_pidfd; /* init, in another PID namespace, has no other way to ask whether outer lives */

static void end_with_parent(void)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
        fail(errno, "cannot bind this process's life to its parent's");
}

/* The parent may have died before we could ask to be told: then its end of the status pipe is closed. */
static void check_parent(pid_t parent_at_start)
{
    struct pollfd status = {.fd = opt.status_fd, .events = 0};
    if (getppid() != parent_at_start ||
        (opt.status_fd >= 0 && poll(&status, 1, 0) == 1 && (status.revents & (POLLERR | POLLHUP))))
        _exit(EXIT_BOX);
}

/* Interpreters ignore SIGPIPE and hand that on; a command must not notice who has started it.  Real-time
   signals are left alone: nobody hands those on ignored, and asking costs as much as all that is here. */
static void reset_signals(void)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int number = 1; number < 32; number++)
        signal(number, SIG_DFL); /* refuses KILL and STOP */
}

/* pread, because the writer of a memfd has left the shared offset at its end. */
static void read_environment(void)
{
    size_t used = 0, room = 16384, count = 0;
    char *text = malloc(room + 1);
    for (ssize_t n; text; used += n) {
        if (used == room)
            text = realloc(text, (room *= 2) + 1);
        n = text ? pread(opt.env_fd, text + used, room - used, used) : 0;
        if (n < 0 && errno == ESPIPE)
            n = read(opt.env_fd, text + used, room - used);
        if (n < 0)
            fail(errno, "cannot read the environment from --env-fd %d", opt.env_fd);
        if (n == 0)
            break;
    }
    if (!text)
        fail(ENOMEM, "cannot hold the environment");
    text[used] = 0;
    for (size_t i = 0; i < used; i++)
        count += !text[i];
    opt.env = calloc(count + 2, sizeof *opt.env);
    if (!opt.env)
        fail(ENOMEM, "cannot hold the environment");
    char **entry = opt.env;
    for (char *at = text; at < text + used; at += strlen(at) + 1)
        *entry++ = at;
}

/* As execvp does: a file that is executable but nothing the kernel knows is a script for /bin/sh.
   The word before the command's own is free to be overwritten, so no new array is needed. */
static void execute(const char *path)
{
    execve(path, opt.argv, opt.env);
    if (errno == ENOEXEC) {
        char **script = opt.argv - 1;
        script[0] = "/bin/sh";
        script[1] = (char *)path;
        execve(script[0], script, opt.env);
    }
}

static const char *search_path(void)
{
    for (char **entry = opt.env; *entry; entry++)
        if (!strncmp(*entry, "PATH=", 5))
            return *entry + 5;
    return "/bin:/usr/bin";
}

/* Returns if the program could not be executed, with the reason in errno. */
static void execute_program(const char *program)
{
    if (strchr(program, '/') || !*program) {
        execute(program);
        return;
    }
    bool denied = false;
    for (const char *part = search_path(), *end; part; part = *end ? end + 1 : NULL) {
        char path[PATH_MAX];
        end = strchrnul(part, ':');
        int length = end - part;
        if (snprintf(path, sizeof path, "%.*s%s%s", length, part, length ? "/" : "./", program) >= PATH_MAX)
            continue;
        execute(path);
        if (errno == EACCES)
            denied = true;
        else if (errno != ENOENT && errno != ENOTDIR && errno != ELOOP && errno != ENAMETOOLONG)
            return;
    }
    errno = denied ? EACCES : ENOENT;
}

static _Noreturn void become_command(void)
{
    char text[LINE_BYTES];
    const char *program = opt.program ? opt.program : opt.argv[0];
    close_range(STDERR_FILENO + 1, ~0U, 0);
    execute_program(program);
    int error = errno;
    snprintf(text, sizeof text, "termite: %s: %s", program, strerror(error));
    write_line(STDERR_FILENO, text);
    _exit(error == ENOENT || error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

/* Process 1 of the box.  It is the command's user, yet the command can neither trace it (it is not
   dumpable) nor kill it (the kernel keeps signals from inside away from process 1). */
static int init(void *unused)
{
    (void)unused;
    run_stage(AS_INIT);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    end_with_parent(); /* only now: changing the user forgets it */
    struct pollfd outer = {.fd = outer_pidfd, .events = POLLIN};
    if (poll(&outer, 1, 0) != 0)
        _exit(EXIT_BOX); /* outer died before end_with_parent() */

    pid_t command = vfork();
    if (command == 0)
        become_command();
    if (command < 0)
        fail(errno, "cannot start the command");
    pid_t ended;
    do
        ended = waitpid(-1, &report.status, __WALL);
    while (ended != command);
    int status;
    if (kill(-1, SIGKILL) == 0)
        while (waitpid(-1, &status, __WALL) > 0)
            ;
    struct rusage usage;
    getrusage(RUSAGE_CHILDREN, &usage);
    report.cpu_us = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * UINT64_C(1000000) + usage.ru_utime.tv_usec
        + usage.ru_stime.tv_usec;
    report.valid = true;
    _exit(0);
}

static void write_report(void)
{
    unsigned char bytes[12];
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint32_t)report.status >> (8 * i);
    for (int i = 0; i < 8; i++)
        bytes[4 + i] = report.cpu_us >> (8 * i);
    write_all(opt.status_fd, bytes, sizeof bytes);
}

/* The outer process: waits for the box to be empty, then tells.  It stays in the box's mount
   namespace, so that unmounting falls to its own end, after the status has been told. */
static int run_box(void)
{
    static char stack[64 * 1024] __attribute__((aligned(16)));
    outer_pidfd = syscall(SYS_pidfd_open, getpid(), 0);
    if (outer_pidfd < 0)
        fail(errno, "cannot get a pidfd");
    pid_t pid = clone(init, stack + sizeof stack, CLONE_VM | CLONE_NEWPID | SIGCHLD, NULL);
    if (pid < 0)
        fail(errno, "cannot start process 1 of the box");
    int status;
    while (waitpid(pid, &status, __WALL) < 0)
        if (errno != EINTR)
            fail(errno, "cannot wait for the box");
    if (!report.valid) {
        if (WIFSIGNALED(status))
            fail(0, "process 1 of the box was killed by signal %d", WTERMSIG(status));
        return EXIT_BOX; /* init has said why */
    }
    if (opt.status_fd >= 0) {
        write_report();
        return 0;
    }
    return WIFSIGNALED(report.status) ? 128 + WTERMSIG(report.status) : WEXITSTATUS(report.status);
}

/* Whoever started us opens our mount namespace and then closes our standard input. */
static int hold_template(void)
{
    char byte;
    write_all(STDOUT_FILENO, "ready\n", 6);
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    return 0;
}

int main(int argc, char **argv)
{
    pid_t parent = getppid();
    extern char **environ;
    opt.env = environ;
    parse_options(argc, argv);
    build_plan();
    if (opt.explain) {
        explain_plan();
        return 0;
    }
    end_with_parent();
    check_parent(parent);
    reset_signals();
    int inherited = umask(022); /* for the mount points made on the way */
    if (opt.umask < 0)
        opt.umask = inherited;
    if (opt.env_fd >= 0)
        read_environment();
    run_stage(HERE);
    run_stage(INSIDE);
    if (opt.hold)
        return hold_template();
    fflush(NULL);
    _exit(run_box());
}
