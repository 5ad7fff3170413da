/* mkbox makes a box for one command, runs the command in it, and leaves nothing behind.

   It goes in this order, and so do its files (options, plan, steps, and here the processes):

     options -> plan -> (--explain prints the plan and stops)
             -> HERE      what must be fetched while the caller's files are still in sight
             -> INSIDE    new namespaces, then every mount, one step after the other
             -> AS_INIT   /proc, limits, and giving up every privilege
             -> the command, until it ends; then everything it left behind is killed

   Three processes take part.  The starter stays root, starts the second one, and waits.  Its child is
   process 1 of the box (init): it makes the box around itself, and tells how the command ended.
   Init's child becomes the command.  The starter is this program, or with --serve a server that makes
   one box after the other (mkbox_serve.c).

   This is done once per remote command, so a system call that can be spared is spared: mount points
   are created only after mounting has failed for want of one. */

#define _GNU_SOURCE
#include "mkbox.h"
#include "slice.h"

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

int starter_pidfd; /* init, in another PID namespace, has no other way to ask whether its starter lives */

void end_with_parent(void)
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
void reset_signals(void)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int number = 1; number < 32; number++)
        signal(number, SIG_DFL); /* refuses KILL and STOP */
}

/* pread, because the writer of a memfd has left the shared offset at its end.  An ordinary environment
   has room without asking for memory. */
static void read_environment(void)
{
    static char small_text[16384], *small_list[512];
    char *text = small_text, *larger;
    size_t used = 0, room = sizeof small_text - 1, count = 0;
    for (ssize_t n;; used += n) {
        if (used == room) {
            larger = malloc((room *= 2) + 1);
            if (!larger)
                fail(ENOMEM, "cannot hold the environment");
            text = memcpy(larger, text, used);
        }
        n = pread(opt.env_fd, text + used, room - used, used);
        if (n < 0 && errno == ESPIPE)
            n = read(opt.env_fd, text + used, room - used);
        if (n < 0)
            fail(errno, "cannot read the environment from --env-fd %d", opt.env_fd);
        if (n == 0)
            break;
    }
    text[used] = 0;
    for (size_t i = 0; i < used; i++)
        count += !text[i];
    opt.env = count + 2 <= sizeof small_list / sizeof *small_list ? small_list : calloc(count + 2, sizeof *opt.env);
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
    if (errno == ENOEXEC && opt.argv != opt.direct) {
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

static _Noreturn void __attribute__((noinline)) not_executed(const char *program, int error)
{
    char text[LINE_BYTES];
    snprintf(text, sizeof text, "termite: %s: %s", program, strerror(error));
    write_line(STDERR_FILENO, text);
    _exit(error == ENOENT || error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

/* What is written here is seen by init, which lends its memory until another program is executed: that no
   shell was needed, or that one is and will see to everything. */
static _Noreturn void become_command(void)
{
    const char *program = opt.program ? opt.program : opt.argv[0];
    ask_for_slice(USUAL_SLICE); /* whoever serves boxes has a short one */
    close_range(STDERR_FILENO + 1, ~0U, 0);
    if (opt.says)
        write_all(STDOUT_FILENO, opt.says, strlen(opt.says));
    if (opt.direct) {
        char **shell = opt.argv;
        opt.argv = opt.direct;
        execute_program(opt.argv[0]);
        opt.argv = shell;
        opt.direct = NULL;
    }
    execute_program(program);
    not_executed(program, errno);
}

/* The wait status of the command; other children that end are forgotten. */
static int ended(pid_t command)
{
    int status;
    while (waitpid(-1, &status, __WALL) != command)
        ;
    return status;
}

/* The wait status that a shell would have, which says so when a command is killed. */
static int as_of_shell(int status)
{
    if (!WIFSIGNALED(status))
        return status;
    int number = WTERMSIG(status);
    if (number != SIGINT && number != SIGPIPE) {
        char text[64];
        snprintf(text, sizeof text, "%s%s", strsignal(number), WCOREDUMP(status) ? " (core dumped)" : "");
        write_line(STDERR_FILENO, text);
    }
    return (128 + number) << 8;
}

/* One file takes the place of another, or of nothing; whatever else mv could be asked for, mv does. */
static bool is_simple_move(void)
{
    struct stat from, to;
    if (lstat(opt.moved, &from) < 0 || !S_ISREG(from.st_mode))
        return false;
    if (lstat(opt.moved_to, &to) < 0)
        return errno == ENOENT;
    return S_ISREG(to.st_mode) && (from.st_ino != to.st_ino || from.st_dev != to.st_dev);
}

/* What follows the command, when that has ended so; the status of it all. */
static int move_after(int status)
{
    if (status != 0)
        return as_of_shell(status);
    if (!opt.moved_to || (is_simple_move() && rename(opt.moved, opt.moved_to) == 0))
        return 0;
    static char *words[] = {NULL, "mv", "-f", NULL, NULL, NULL};
    words[3] = (char *)opt.moved;
    words[4] = (char *)opt.moved_to;
    opt.argv = words + 1;
    opt.program = opt.argv[0];
    opt.direct = NULL;
    opt.says = NULL;
    pid_t mv = vfork();
    if (mv == 0)
        become_command();
    if (mv < 0)
        fail(errno, "cannot start mv");
    return as_of_shell(ended(mv));
}

static void tell_status(int status)
{
    struct rusage usage;
    unsigned char bytes[12];
    getrusage(RUSAGE_CHILDREN, &usage);
    uint64_t cpu_us = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * UINT64_C(1000000) + usage.ru_utime.tv_usec
        + usage.ru_stime.tv_usec;
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint32_t)status >> (8 * i);
    for (int i = 0; i < 8; i++)
        bytes[4 + i] = cpu_us >> (8 * i);
    write_all(opt.status_fd, bytes, sizeof bytes);
}

/* Process 1 of the box.  It is the command's user, yet the command can neither trace it (it is not
   dumpable) nor kill it (the kernel keeps signals from inside away from process 1).  Every other
   process of the box is its child sooner or later: when it has no child left, the box is empty, and
   nothing can be written any more.  Unmounting falls to its own end, after the status has been told. */
_Noreturn void make_box(void)
{
    int inherited = umask(022); /* for the mount points made on the way */
    if (opt.umask < 0)
        opt.umask = inherited;
    if (opt.env_fd >= 0)
        read_environment();
    run_stage(HERE);
    run_stage(INSIDE);
    run_stage(AS_INIT);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    end_with_parent(); /* only now: changing the user forgets it */
    struct pollfd starter = {.fd = starter_pidfd, .events = POLLIN};
    if (poll(&starter, 1, 0) != 0)
        _exit(EXIT_BOX); /* it died before end_with_parent() */

    if (opt.enter && chdir(opt.enter) < 0)
        opt.direct = NULL; /* the shell says why */

    pid_t command = vfork();
    if (command == 0)
        become_command();
    if (command < 0)
        fail(errno, "cannot start the command");
    int status = ended(command), other;
    if (opt.direct)
        status = move_after(status);
    if (kill(-1, SIGKILL) == 0 || errno != ESRCH)
        while (waitpid(-1, &other, __WALL) > 0)
            ;
    if (opt.status_fd < 0)
        _exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
    tell_status(status);
    _exit(0);
}

static int init(void *unused)
{
    (void)unused;
    make_box();
}

/* The starter of one box; they share their memory, so that starting it copies nothing. */
static int run_box(void)
{
    static char stack[64 * 1024] __attribute__((aligned(16)));
    starter_pidfd = syscall(SYS_pidfd_open, getpid(), 0);
    if (starter_pidfd < 0)
        fail(errno, "cannot get a pidfd");
    pid_t pid = clone(init, stack + sizeof stack, CLONE_VM | CLONE_NEWPID | SIGCHLD, NULL);
    if (pid < 0)
        fail(errno, "cannot start process 1 of the box");
    int status;
    while (waitpid(pid, &status, __WALL) < 0)
        if (errno != EINTR)
            fail(errno, "cannot wait for the box");
    if (WIFSIGNALED(status))
        fail(0, "process 1 of the box was killed by signal %d", WTERMSIG(status));
    return WEXITSTATUS(status);
}

/* Whoever started us opens our mount namespace and then closes our standard input. */
static int hold_template(void)
{
    char byte;
    umask(022);
    run_stage(HERE);
    run_stage(INSIDE);
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
    if (opt.explain) {
        build_plan();
        explain_plan();
        return 0;
    }
    end_with_parent();
    check_parent(parent);
    reset_signals();
    if (opt.serve_fd >= 0)
        serve(opt.serve_fd);
    if (opt.sweep_fd >= 0)
        sweep(opt.sweep_fd);
    build_plan();
    return opt.hold ? hold_template() : run_box();
}
