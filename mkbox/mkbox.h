/* What the files of mkbox share.  mkbox.c tells the whole story. */

#ifndef MKBOX_H
#define MKBOX_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/types.h>

enum { EXIT_USAGE = 2, EXIT_BOX = 125, EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127 };
enum { MAX_STEPS = 1024, MAX_LIMITS = 16, LINE_BYTES = 3 * PATH_MAX };

/* -- options (mkbox_options.c) -- */

/* The letter of -b -t -r -D -L, or one of these: what to put into the box, in the order given. */
enum { OPTION_DEV = 256, OPTION_PTS, OPTION_CLOSED };

struct operation {
    int option;
    const char *path; /* where in the box */
    const char *from; /* -b: source, -L: target; NULL: the option has none */
};

struct limit {
    const char *name;
    int resource;
    rlim_t value;
};

struct options {
    const char *root;                            /* NULL: join mnt_ns instead */
    const char *program;                         /* NULL: argv[0] */
    const char *directory;                       /* the command's working directory */
    const char *proc, *hostname;                 /* NULL: leave alone */
    const char *tmp_size;                        /* NULL: the kernel's default, half of the memory */
    const char *lower, *upper, *work, *writable; /* all NULL: no overlay; lower NULL: lower_fd */
    int lower_fd, mnt_ns, net_ns;                /* -1: not given */
    int env_fd, status_fd, serve_fd, sweep_fd;   /* -1: not given */
    int error_fd;
    bool tmpfs_root, new_net, hold, quiet, explain;
    uid_t uid;
    gid_t gid;
    int umask;                                   /* -1: as it was when mkbox started */
    char **argv;                                 /* the command; argv[-1] is ours to overwrite */
    char **direct;                               /* executed instead, if it can be; NULL: nothing is */
    const char *says;                            /* with `direct`: written before; NULL: nothing */
    const char *enter;                           /* with `direct`: where, if not in `directory`; NULL: there */
    const char *moved, *moved_to;                /* with `direct`: renamed if it succeeds; moved_to NULL: nothing */
    char **env;                                  /* the command's environment */
    int limit_count, operation_count;
    struct limit limits[MAX_LIMITS];
    struct operation operations[MAX_STEPS]; /* last, because most of it is never touched */
};

extern struct options opt; /* complete, and final but for env and umask, when parse_options() returns */

void parse_options(int argc, char **argv);

/* -- steps: each can be described and executed (mkbox_steps.c) -- */

enum stage { HERE, INSIDE, AS_INIT };

struct step;

struct verb {
    enum stage stage;
    const char *says;  /* followed by the step's path */
    const char *about; /* followed by the step's `from`, if it has one */
    void (*execute)(struct step *);
};

struct step {
    const struct verb *verb;
    const char *path, *from; /* NULL: none */
    struct step *source;     /* DO_BIND, DO_WRITE: the step that opened what is mounted here */
    int fd;                  /* DO_TAKE, DO_OVERLAY: what this step opened */
};

extern const struct verb
    DO_TAKE, DO_OVERLAY, DO_JOIN_NET, DO_JOIN_MNT,
    DO_UNSHARE, DO_ROOT, DO_MKDIR, DO_CLOSED, DO_TMPFS, DO_DEVICES, DO_DEVPTS, DO_BIND, DO_LINK, DO_READ_ONLY, DO_WRITE,
    DO_HOSTNAME, DO_NET_UP, DO_SEAL,
    DO_PROC, DO_LIMIT, DO_DROP, DO_CHDIR, DO_UMASK;

/* -- the plan: which steps, in which order (mkbox_plan.c) -- */

void build_plan(void);
void run_stage(enum stage stage);
void explain_plan(void);

/* For a process that starts many boxes, and never another program: the bounding set matters to execve()
   alone, so it can be given up once, by the starter, and each box has one chore less. */
void drop_bounding_set(void);

/* -- the processes (mkbox.c) -- */

extern int starter_pidfd; /* must be open in init */

void end_with_parent(void);
void reset_signals(void);

/* What process 1 of a new PID namespace does from here on; the options say what. */
_Noreturn void make_box(void);

/* -- the server (mkbox_serve.c) -- */

_Noreturn void serve(int socket);

/* -- the sweeper (mkbox_sweep.c) -- */

_Noreturn void sweep(int socket);

/* -- telling (mkbox_tell.c) -- */

/* Writes until all is written or nobody is left to read. */
void write_all(int fd, const void *bytes, size_t count);

/* One line, whatever bytes a path in it holds: control characters are written as \xNN. */
void write_line(int fd, const char *text);

/* What to do about it; "" if there is nothing to say. */
const char *advice(int error);

/* There is no box: says why and ends this process.  ERROR 0: the text says it all. */
_Noreturn void fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The options make no sense: nothing has been done. */
_Noreturn void usage(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
