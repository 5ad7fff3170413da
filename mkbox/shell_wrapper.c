/* termite-shell-wrapper: what make runs in place of each command.
 *
 * Decides nothing: it hands the command to the master over `.termite-socket` and does as it is told, which is
 * either to pass output along and end as the command ended, or to become the command (`-exec`ed in place, so
 * that process group, terminal, standard files and the jobserver's descriptors are what make gave it).
 * Started once per recipe line, hence static and in C.
 *
 * main() -> parse() -> by what was asked: run(), or ask the master and end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "client.h"
#include "inplace.h"
#include "slice.h"

#define ANSWER_SECONDS 60 /* for requests that the master answers by itself */

static const char HELP[] =
    "termite-shell-wrapper: hand one command to the termite-master of this project\n"
    "\n"
    "In place of a shell (make SHELL=termite-shell-wrapper, or MAKE_SHELL of a patched make):\n"
    "  termite-shell-wrapper -c COMMAND          any flags of a shell may stand before COMMAND:\n"
    "  termite-shell-wrapper -eu -o pipefail -c COMMAND\n"
    "  termite-shell-wrapper SCRIPT ARGS...\n"
    "\n"
    "In front of a program (for example as CMAKE_C_COMPILER_LAUNCHER=\"termite-shell-wrapper;-exec\"):\n"
    "  termite-shell-wrapper -exec PROGRAM ARGS...\n"
    "  termite-shell-wrapper -exec -- PATH ARGV0 ARGS...    the file to execute and its argv[0] apart\n"
    "  termite-shell-wrapper -local -- PATH ARGV0 ARGS...   run it here; the master looks at the files afterwards\n"
    "\n"
    "To the master itself:\n"
    "  -refresh            look again at files that were changed behind its back\n"
    "  -inspect FILE...    say what it knows about these files; without any, about itself (JSON)\n"
    "  -shutdown           end it\n"
    "\n"
    "Before any of these:\n"
    "  -dir DIR            go to DIR first\n"
    "  -worker NAME        prefer this worker\n"
    "  -dbg                master and worker log what becomes of this command (also: TERMITE_DEBUG=1)\n"
    "\n"
    "The master is the one whose socket TERMITE_SOCKET names, else the nearest .termite-socket in this or a\n"
    "parent directory.  With TERMITE_LOCAL=1 the command simply runs here.  TERMITE_SHELL names the shell for\n"
    "the first form; otherwise it is /bin/sh, or /bin/bash when the flags need it.  The exit status is the\n"
    "command's; 1 when there is no master, 2 for a wrong command line.\n";

struct order {
    struct request request;
    bool runs; /* executes a command, rather than asking the master for something */
};

/* ---- the command line ---------------------------------------------------------------------- */

static _Noreturn void wrong(const char *what, const char *argument) {
    fprintf(stderr, "termite-shell-wrapper: %s%s; see termite-shell-wrapper --help\n", what, argument);
    exit(2);
}

/* If ARG is NAME with one or two dashes: "" or, behind "=", its value; else NULL. */
static const char *own_flag(const char *arg, const char *name) {
    if (*arg++ != '-') return NULL;
    if (*arg == '-') arg++;
    size_t length = strlen(name);
    if (strncmp(arg, name, length)) return NULL;
    arg += length;
    return *arg == '=' ? arg + 1 : *arg ? NULL : arg;
}

/* The value of a flag: what stood behind "=", or the next argument. */
static const char *value_of(const char *attached, char ***args) {
    if (*attached) return attached;
    if (!(*args)[1]) wrong("a value is missing after ", **args);
    return *++*args;
}

static bool one_of(const char *const *names, const char *name) {
    for (; *names; names++)
        if (!strcmp(*names, name)) return true;
    return false;
}

/* The long options of bash; of all shells only bash has any. */
static bool is_long_option(const char *arg, bool *takes_value) {
    static const char *const valued[] = {"--rcfile", "--init-file", NULL};
    static const char *const plain[] = {"--login", "--noediting", "--noprofile", "--norc", "--posix", "--restricted",
                                        "--verbose", "--debugger", "--dump-strings", "--dump-po-strings", NULL};
    *takes_value = one_of(valued, arg);
    return *takes_value || one_of(plain, arg);
}

/* What dash has for -o; any other name is bash's. */
static bool is_plain_option(const char *name) {
    static const char *const names[] = {"errexit", "noglob",   "ignoreeof", "interactive", "monitor", "noexec",
                                        "stdin",   "xtrace",   "verbose",   "vi",          "emacs",   "noclobber",
                                        "notify",  "allexport", "nounset",  "nolog",       "debug",   NULL};
    return one_of(names, name);
}

/* Which shell understands these arguments; they reach it unchanged. */
static const char *shell_for(char **args) {
    const char *named = getenv("TERMITE_SHELL");
    bool bash = false, command = false;
    for (; *args; args++) {
        const char *arg = *args;
        bool valued;
        if (!strcmp(arg, "--") || !strcmp(arg, "-")) {
            args++;
            break;
        }
        if ((*arg != '-' && *arg != '+') || !arg[1]) break;
        if (is_long_option(arg, &valued)) {
            bash = true;
            if (valued && args[1]) args++;
            continue;
        }
        if (!command && strspn(arg + 1, "abcefhiklmnoprstuvxBCDEHILOPTVq") != strlen(arg + 1))
            wrong("unknown flag ", arg);
        if (strpbrk(arg + 1, "hkprtBDEHLOPT")) bash = true;
        if (*arg == '-' && strchr(arg, 'c')) command = true;
        for (const char *letter = arg + 1; *letter; letter++) {
            if (*letter != 'o' && *letter != 'O') continue;
            if (!args[1]) wrong("a name is missing after ", arg);
            if (!is_plain_option(*++args)) bash = true;
        }
    }
    if (!*args) wrong(command ? "a command is missing after -c" : "there is nothing to run", "");
    return named && *named ? named : bash ? "/bin/bash" : "/bin/sh";
}

/* ARGS: what a shell would be given.  There are two places before them in the array (argv[0] is one). */
static void parse_shell(char **args, struct request *request) {
    request->program = shell_for(args);
    args[-1] = (char *)request->program;
    request->argv = args - 1;
}

/* ARGS: what stands behind -exec or -local. */
static void parse_program(char **args, struct request *request) {
    bool apart = *args && !strcmp(*args, "--");
    if (apart) args++;
    if (!*args) wrong("a program is missing", "");
    request->program = strchr(*args, '/') ? *args : "";
    if (apart) {
        const char *path = *args++;
        if (!*args) wrong("argv[0] is missing after -- ", path);
        if (strcmp(path, *args)) request->program = path;
    }
    request->argv = args;
}

static struct order parse(char **args) {
    static char *nothing[] = {NULL};
    const char *debug = getenv("TERMITE_DEBUG"), *value;
    struct request request = {.kind = REQUEST_RUN, .program = "", .worker = "", .argv = nothing, .env = environ};
    if (debug && *debug && strcmp(debug, "0")) request.flags |= FLAG_DEBUG;
    for (; *args; args++) {
        const char *arg = *args;
        if (own_flag(arg, "dbg")) {
            request.flags |= FLAG_DEBUG;
        } else if ((value = own_flag(arg, "dir"))) {
            value = value_of(value, &args);
            if (chdir(value)) fail(1, "-dir %s: %s", value, strerror(errno));
        } else if ((value = own_flag(arg, "worker"))) {
            request.worker = value_of(value, &args);
        } else if (own_flag(arg, "exec") || own_flag(arg, "local")) {
            if (own_flag(arg, "local")) request.kind = REQUEST_LOCAL;
            parse_program(args + 1, &request);
            return (struct order){request, true};
        } else if (own_flag(arg, "inspect")) {
            request.kind = REQUEST_INSPECT;
            request.argv = args + 1;
            return (struct order){request, false};
        } else if (own_flag(arg, "refresh") || own_flag(arg, "shutdown")) {
            request.kind = own_flag(arg, "refresh") ? REQUEST_REFRESH : REQUEST_SHUTDOWN;
            if (args[1]) wrong("nothing may follow ", arg);
            return (struct order){request, false};
        } else if (own_flag(arg, "help")) {
            fputs(HELP, stdout);
            exit(fflush(stdout) ? 1 : 0);
        } else {
            parse_shell(args, &request);
            return (struct order){request, true};
        }
    }
    wrong("there is nothing to do", "");
}

/* ---- what the command's standard files are ------------------------------------------------- */

static bool output_is_merged(void) {
    struct stat out, err;
    if (fstat(STDOUT_FILENO, &out) || fstat(STDERR_FILENO, &err)) return false;
    if (out.st_dev != err.st_dev || out.st_ino != err.st_ino) return false;
    if (!S_ISREG(out.st_mode)) return true;
    /* A file opened twice has two offsets, and each stream its own place in it. */
    return syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, STDOUT_FILENO, STDERR_FILENO) <= 0;
}

/* Make gives all but one of its parallel commands a pipe without writer. */
static bool stdin_may_have_data(void) {
    struct stat st;
    if (fstat(STDIN_FILENO, &st)) return false;
    if (S_ISCHR(st.st_mode)) return st.st_rdev != makedev(1, 3) && !isatty(STDIN_FILENO);
    if (S_ISREG(st.st_mode)) return lseek(STDIN_FILENO, 0, SEEK_CUR) < st.st_size;
    struct pollfd pipe = {.fd = STDIN_FILENO, .events = POLLIN};
    return poll(&pipe, 1, 0) <= 0 || (pipe.revents & POLLIN);
}

/* ---- running it ---------------------------------------------------------------------------- */

/* What the command shall inherit: without RECURSE nothing of ours, and the word that nothing below is to be
 * handed out; with it everything, so that a make or ninja below is caught as this one was. */
static char **environment(bool recurse) {
    size_t count = 0;
    while (environ[count]) count++;
    char **env = allocate((count + 2) * sizeof *env), **to = env;
    for (char **from = environ; *from; from++) {
        if (!strncmp(*from, "TERMITE_LOCAL=", 14)) continue;
        if (!recurse && !strncmp(*from, "TERMITE_WRAPPER=", 16)) continue;
        if (!recurse && !strncmp(*from, "LD_PRELOAD=", 11)) {
            char *rest = without_interposer(*from + 11);
            if (!*rest) continue;
            *to = allocate(strlen(rest) + 12);
            stpcpy(stpcpy(*to++, "LD_PRELOAD="), rest);
            continue;
        }
        *to++ = *from;
    }
    if (!recurse) *to++ = "TERMITE_LOCAL=1";
    *to = NULL;
    return env;
}

static _Noreturn void run_here(const struct request *request, bool recurse) {
    const char *program = *request->program ? request->program : request->argv[0];
    int error = execute(program, request->argv, environment(recurse));
    fail(error == ENOENT ? 127 : 126, "%s: %s", program, strerror(error));
}

static const char *described(const struct request *request) {
    static char text[300];
    size_t length = 0;
    for (char **arg = request->argv; *arg && length < sizeof text; arg++)
        length += snprintf(text + length, sizeof text - length, "%s%s", length ? " " : "", *arg);
    if (length >= sizeof text) strcpy(text + sizeof text - 4, "...");
    return *text ? text : "(a request)";
}

static _Noreturn void no_master(const char *socket, int error) {
    if (socket) fail(1, "no master at %s: %s", socket, why_unreachable(error));
    fail(1, "no master: no %s in %s or above it; start termite-master in the project root, or use termite-make",
         SOCKET_NAME, working_directory());
}

int main(int argc, char **argv) {
    (void)argc;
    struct order order = parse(argv + 1);
    struct request *request = &order.request;
    const char *local = getenv("TERMITE_LOCAL");
    if (order.runs && local && *local) run_here(request, false);

    char *socket = find_socket();
    int fd = socket ? connect_to(socket) : -1;
    if (fd < 0 && request->kind == REQUEST_LOCAL) run_here(request, false);
    if (fd < 0) no_master(socket, errno);

    if (output_is_merged()) request->flags |= FLAG_MERGED;
    if (order.runs && stdin_may_have_data()) request->flags |= FLAG_STDIN;
    if (!ask(fd, request) && errno == EAGAIN) no_master(socket, EAGAIN);
    uint64_t slice = ask_for_slice(SHORT_SLICE); /* make cannot go on before this process has */
    /* A request that could not be sent whole may have been answered: with the reason. */
    struct answer answer = obey(fd, request->kind == REQUEST_RUN ? 0 : ANSWER_SECONDS);
    if (answer.what != ANSWER_EXIT) ask_for_slice(slice); /* the command may be this process yet */
    switch (answer.what) {
    case ANSWER_EXIT:
        end_like(answer.value);
    case ANSWER_LOCAL:
        if (order.runs) run_here(request, answer.value & LOCAL_RECURSE);
        break;
    case ANSWER_LATE:
        no_master(socket, EAGAIN);
    case ANSWER_LOST:
        if (request->kind == REQUEST_SHUTDOWN) return 0; /* it did */
        if (request->kind == REQUEST_LOCAL) run_here(request, false);
        fail(1, "the master (%s) went away while running: %s; start termite-master again", socket, described(request));
    case ANSWER_GARBAGE:
        break;
    }
    fail(1, "the master (%s) speaks another protocol; are all programs of the same version?", socket);
}
