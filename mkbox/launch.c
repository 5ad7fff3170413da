/* termite-make and termite-run: make, or any command that runs one, with its recipes handed to the master.
 *
 * Compiled twice; LAUNCH_RUN makes it termite-run.  Native because every recursive make starts it again.
 * It ends in one of four ways, all of them an exec:
 * - TERMITE_LOCAL is set: the plain command, for everything below has been decided to run here;
 * - a master listens: the command under the interposer, after the master has looked at the files again;
 * - no master: termite-session, which starts what is missing and runs this program once more.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client.h"
#include "inplace.h"

#ifdef LAUNCH_RUN
#define IS_MAKE false
#define SESSION_MODE "run"
#else
#define IS_MAKE true
#define SESSION_MODE "make"
#endif

#define REFRESH_SECONDS 60
#define QUIET_FD 200 /* high enough that no recipe writes `exec 3>...` over it */

static const char MAKE_HELP[] =
    "termite-make [ARGUMENTS OF MAKE]: an unmodified make, its commands run by the workers of termite\n"
    "\n"
    "Uses the termite-master whose .termite-socket lies in this or a parent directory (or which TERMITE_SOCKET\n"
    "names).  Without one, it starts one for this build: with the coordinator that TERMITE_COORDINATOR names, or\n"
    "else with a coordinator and a worker of its own on this machine.  All arguments are make's; the status too.\n"
    "Which commands run here, because they must, the file .termite-localrc says.\n"
    "\n"
    "Environment: TERMITE_MAKE       the make to run, if it is not the first on PATH (it must not be static)\n"
    "             TERMITE_LOCAL=1    plain make, nothing handed out\n"
    "             TERMITE_INTERPOSE  where " INTERPOSER_NAME " is, if not beside the programs\n"
    "See also: termite-make --help (make's own), termite-run --help.\n";

static const char RUN_HELP[] =
    "termite-run -- COMMAND ARGUMENTS...: run COMMAND; make and ninja in it hand their commands to the workers\n"
    "\n"
    "  termite-run -- ninja -j 20\n"
    "  termite-run -- cmake --build build\n"
    "  termite-run -- ./build.sh\n"
    "\n"
    "It works inside make, gmake, ninja and samurai, and in programs that TERMITE_TOOLS names (separated by\n"
    "spaces), unless they are statically linked.  See termite-make --termite-help for the environment.\n";

/* ---- where things are ---------------------------------------------------------------------- */

/* The directory of this very program. */
static const char *own_directory(void) {
    static char path[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (length <= 0) fail(1, "cannot read /proc/self/exe: %s; is /proc mounted?", strerror(errno));
    path[length] = 0;
    *strrchr(path, '/') = 0;
    return path;
}

static char *beside(const char *name) {
    return joined(own_directory(), strlen(own_directory()), name);
}

static char *interposer(void) {
    const char *named = getenv("TERMITE_INTERPOSE");
    const char *places[] = {"../lib/termite/" INTERPOSER_NAME, INTERPOSER_NAME, NULL};
    if (named && *named) {
        const char *name = strrchr(named, '/') ? strrchr(named, '/') + 1 : named;
        if (strcmp(name, INTERPOSER_NAME)) fail(1, "TERMITE_INTERPOSE=%s: must name a %s", named, INTERPOSER_NAME);
        if (access(named, R_OK)) fail(1, "TERMITE_INTERPOSE=%s: %s", named, strerror(errno));
        char *cwd = working_directory();
        return *named == '/' ? strdup(named) : joined(cwd, strlen(cwd), named);
    }
    for (const char **place = places; *place; place++) {
        char *path = beside(*place);
        if (!access(path, R_OK)) return path;
    }
    fail(1, "%s is neither in %s/../lib/termite nor in %s; install termite again, or set TERMITE_INTERPOSE",
         INTERPOSER_NAME, own_directory(), own_directory());
}

static bool is_this_program(const char *path) {
    struct stat a, b;
    return !stat(path, &a) && !stat("/proc/self/exe", &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* The first NAME on PATH that is not this program; NULL when there is none. */
static char *on_path(const char *name) {
    const char *path = getenv("PATH");
    for (path = path ? path : "/bin:/usr/bin";; path++) {
        size_t length = strcspn(path, ":");
        char *candidate = length ? joined(path, length, name) : joined(".", 1, name);
        if (!access(candidate, X_OK) && !is_this_program(candidate)) return candidate;
        free(candidate);
        path += length;
        if (!*path) return NULL;
    }
}

/* ---- the master ---------------------------------------------------------------------------- */

static void set(const char *name, const char *value) {
    if (setenv(name, value, true)) fail(1, "out of memory");
}

/* A master that listens: its socket and the connection to it; NULL when there is none.  One that was named
 * must be there: termite-session names the one it has started, and must not start another for it. */
static char *reach_master(int *fd) {
    const char *named = getenv("TERMITE_SOCKET");
    char *socket = find_socket();
    if (!socket) return NULL;
    *fd = connect_to(socket);
    if (*fd >= 0) return socket;
    bool nobody = errno == ECONNREFUSED || errno == ENOENT;
    if (!nobody || (named && *named)) fail(1, "no master at %s: %s", socket, why_unreachable(errno));
    complain("%s is left over from a master that has ended", socket);
    return NULL;
}

/* Before the first command of a build: files may have been changed since the master last looked. */
static void refresh(int fd, const char *socket) {
    char *none[] = {NULL};
    struct request request = {.kind = REQUEST_REFRESH, .program = "", .worker = "", .argv = none, .env = environ};
    if (!ask(fd, &request) && errno == EAGAIN) fail(1, "no master at %s: %s", socket, why_unreachable(EAGAIN));
    struct answer answer = obey(fd, REFRESH_SECONDS);
    close(fd);
    if (answer.what == ANSWER_LATE)
        fail(1, "the master (%s) did not look through the files within %d s; see its log", socket, REFRESH_SECONDS);
    if (answer.what == ANSWER_LOST) fail(1, "the master (%s) went away; start termite-master again", socket);
    if (answer.what != ANSWER_EXIT) fail(1, "the master (%s) speaks another protocol; update termite", socket);
    if (answer.value) end_like(answer.value);
}

/* A recursive make, or make starting over: the master knows about this build already. */
static bool is_inside_build(void) {
    const char *wrapper = getenv("TERMITE_WRAPPER"), *named = getenv("TERMITE_SOCKET");
    return wrapper && *wrapper && named && *named == '/';
}

/* ---- the interposer ------------------------------------------------------------------------ */

/* PATH, or if one of SPECIAL is in its directory, its name by way of that directory, opened for everything
 * below: LD_PRELOAD is split at spaces and colons and expands $, PATH is split at colons, and neither can quote. */
static char *plain_name(const char *path, const char *special) {
    if (!strpbrk(path, special)) return strdup(path);
    char *name;
    size_t length = strrchr(path, '/') - path;
    char *directory = strndup(path, length);
    int fd = open(directory, O_PATH | O_DIRECTORY);
    if (fd < 0) fail(1, "cannot open %s: %s", directory, strerror(errno));
    int quiet = fcntl(fd, F_DUPFD, QUIET_FD);
    if (quiet >= 0) close(fd);
    if (asprintf(&name, "/proc/self/fd/%d%s", quiet >= 0 ? quiet : fd, path + length) < 0) fail(1, "out of memory");
    free(directory);
    return name;
}

static void preload(void) {
    const char *before = getenv("LD_PRELOAD");
    size_t length;
    const char *there = before ? interposer_in(before, &length) : NULL;
    if (there && !access(strndup(there, length), R_OK)) return;
    char *name = plain_name(interposer(), " :$"), *others = without_interposer(before ? before : ""), *list;
    if (asprintf(&list, "%s%s%s", name, *others ? ":" : "", others) < 0) fail(1, "out of memory");
    set("LD_PRELOAD", list);
}

/* $(MAKE) is "termite-make", so this name must be on PATH. */
static void put_on_path(void) {
    const char *path = getenv("PATH");
    for (const char *at = path; at && *at; at += strcspn(at, ":"), at += *at == ':') {
        size_t length = strcspn(at, ":");
        char *candidate = joined(at, length, "termite-make");
        bool found = length && !access(candidate, X_OK);
        free(candidate);
        if (found) return;
    }
    char *own = plain_name(beside("termite-make"), ":"), *longer;
    *strrchr(own, '/') = 0;
    if (asprintf(&longer, "%s:%s", path && *path ? path : "/usr/bin:/bin", own) < 0) fail(1, "out of memory");
    set("PATH", longer);
}

/* ---- the command --------------------------------------------------------------------------- */

/* A make that was named on termite-run's command line is also the one for its recursive makes. */
static void remember_make(const char *program) {
    const char *name = strrchr(program, '/') ? strrchr(program, '/') + 1 : program;
    if (getenv("TERMITE_MAKE") || (strcmp(name, "make") && strcmp(name, "gmake"))) return;
    char *path = realpath(program, NULL);
    if (path && strchr(program, '/')) set("TERMITE_MAKE", path);
    free(path);
}

static _Noreturn void become(char **argv) {
    const char *named = getenv("TERMITE_MAKE");
    const char *program = argv[0];
    if (IS_MAKE) {
        if (!named || !*named) named = "make";
        program = strchr(named, '/') ? named : on_path(named);
        if (!program) fail(127, "there is no %s on PATH; install it (apt-get install make)", named);
        if (is_this_program(program)) fail(2, "TERMITE_MAKE names termite-make itself; it must name a make");
        argv[0] = "termite-make";
    } else {
        remember_make(program);
    }
    int error = execute(program, argv, environ);
    fail(error == ENOENT ? 127 : 126, "%s: %s", program, strerror(error));
}

static _Noreturn void start_session(char **argv, size_t argc) {
    char *session = beside("termite-session");
    if (access(session, X_OK)) session = on_path("termite-session");
    if (!session)
        fail(1, "no master: no %s in %s or above it, and termite-session, which would start one, is not installed; "
                "start termite-master in the project root", SOCKET_NAME, working_directory());
    char **args = allocate((argc + 4) * sizeof *args), **to = args;
    *to++ = "termite-session";
    *to++ = SESSION_MODE;
    if (!IS_MAKE) *to++ = "--";
    memcpy(to, argv + IS_MAKE, (argc + 1 - IS_MAKE) * sizeof *argv);
    int error = execute(session, args, environ);
    fail(1, "%s: %s", session, strerror(error));
}

/* termite-run: where the command starts in ARGV. */
static char **command_in(char **argv) {
    char **at = argv + 1;
    if (*at && (!strcmp(*at, "--help") || !strcmp(*at, "-help") || !strcmp(*at, "-h"))) {
        fputs(RUN_HELP, stdout);
        exit(fflush(stdout) ? 1 : 0);
    }
    if (*at && !strcmp(*at, "--")) at++;
    else if (*at && **at == '-') fail(2, "termite-run: unknown flag %s; see termite-run --help", *at);
    if (!*at) fail(2, "termite-run: a command is missing; see termite-run --help");
    return at;
}

int main(int argc, char **argv) {
    const char *local = getenv("TERMITE_LOCAL");
    if (!IS_MAKE) {
        char **command = command_in(argv);
        argc -= command - argv;
        argv = command;
    } else if (argc > 1 && !strcmp(argv[1], "--termite-help")) {
        fputs(MAKE_HELP, stdout);
        return fflush(stdout) ? 1 : 0;
    }
    if (local && *local) {
        put_on_path();
        become(argv);
    }
    if (!is_inside_build()) {
        int fd;
        char *socket = reach_master(&fd), token[16];
        if (!socket) start_session(argv, argc);
        snprintf(token, sizeof token, "%d", (int)getpid());
        set("TERMITE_BUILD", token); /* which commands belong to this build, and who is its topmost program */
        refresh(fd, socket);
        set("TERMITE_SOCKET", socket);
    }
    set("TERMITE_WRAPPER", beside("termite-shell-wrapper"));
    preload();
    put_on_path();
    become(argv);
}
