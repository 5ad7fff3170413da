/* The command line becomes `opt`; whatever makes no sense ends here, with one line and status 2. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef TERMITE_VERSION
#define TERMITE_VERSION "0.1.0"
#endif

enum { NOBODY = 65534 };

struct options opt; /* no initialiser: then its unused pages are never touched */

static void set_defaults(void)
{
    opt.directory = "/";
    opt.lower_fd = opt.mnt_ns = opt.net_ns = opt.env_fd = opt.status_fd = opt.serve_fd = opt.sweep_fd = opt.umask = -1;
    opt.error_fd = STDERR_FILENO;
    opt.uid = opt.gid = NOBODY;
}

enum long_option {
    TMPFS_ROOT = OPTION_CLOSED + 1, FROM, TMP_SIZE, HOLD, MNT_NS, NET_NS, NEW_NET, LOWER_FD, LOWER, UPPER, WORK,
    WRITABLE, PROC, UMASK, ENV_FD, STATUS_FD, ERROR_FD, HOSTNAME, RLIMIT, DIRECT, SAY, ENTER, MOVE,
    EXPLAIN, SERVE, SWEEP, VERSION, HELP,
};

static const struct option long_options[] = {
    {"tmpfs-root", 0, 0, TMPFS_ROOT}, {"bind", 1, 0, 'b'}, {"link", 1, 0, 'L'}, {"from", 1, 0, FROM},
    {"dev", 1, 0, OPTION_DEV}, {"pts", 1, 0, OPTION_PTS}, {"closed", 1, 0, OPTION_CLOSED},
    {"tmp-size", 1, 0, TMP_SIZE}, {"hold", 0, 0, HOLD},
    {"mnt-ns", 1, 0, MNT_NS}, {"net-ns", 1, 0, NET_NS}, {"new-net", 0, 0, NEW_NET},
    {"lower-fd", 1, 0, LOWER_FD}, {"lower", 1, 0, LOWER}, {"upper", 1, 0, UPPER}, {"work", 1, 0, WORK},
    {"writable", 1, 0, WRITABLE}, {"proc", 1, 0, PROC}, {"umask", 1, 0, UMASK}, {"env-fd", 1, 0, ENV_FD},
    {"status-fd", 1, 0, STATUS_FD}, {"error-fd", 1, 0, ERROR_FD}, {"hostname", 1, 0, HOSTNAME},
    {"rlimit", 1, 0, RLIMIT}, {"direct", 1, 0, DIRECT}, {"say", 1, 0, SAY},
    {"enter", 1, 0, ENTER}, {"move", 1, 0, MOVE}, {"explain", 0, 0, EXPLAIN}, {"serve", 1, 0, SERVE}, {"sweep", 1, 0, SWEEP},
    {"version", 0, 0, VERSION}, {"help", 0, 0, HELP}, {0},
};

static const char help[] =
"mkbox: run one command in a box of its own\n"
"\n"
"  mkbox -s DIR [what to put into it] [options] -- COMMAND ARGUMENT...\n"
"  mkbox -s DIR [what to put into it] --hold                  (make a template and keep it)\n"
"  mkbox --mnt-ns FD [what to add] [options] -- COMMAND ...   (start from a template)\n"
"  mkbox --serve FD                                           (a box for each packet from the socket FD)\n"
"  mkbox --sweep FD                      (removes the directory that each packet from the socket FD names)\n"
"\n"
"Try this; as root, it changes nothing on your machine.  Add --explain to see the plan only:\n"
"\n"
"  mkbox -q -s /mnt --tmpfs-root -b /usr=usr -r usr -L usr/bin=bin -L usr/lib=lib -L usr/lib64=lib64 \\\n"
"        --dev dev -t tmp --proc proc --new-net -- /bin/sh -c 'id; ls /; ps ax; ip addr'\n"
"\n"
"The command has a file system, process numbers, IPC and a host name of its own.  It is not root and\n"
"cannot become root.  When it ends, everything it started is killed.\n"
"\n"
"The root of the box\n"
"  -s DIR            DIR becomes / and is read-only in the end; nothing else of this machine is in sight\n"
"  --tmpfs-root      ... not DIR as it is, but an empty tmpfs mounted on it\n"
"  --mnt-ns FD       the root of this mount namespace (a template made with --hold) instead of -s\n"
"What to put into it, done in the order given; paths in the box may be written with or without leading /\n"
"  -b SRC=DST        show SRC of this machine, and what is mounted below it, as DST (split at the last =)\n"
"  -L TARGET=NAME    make the symlink NAME (--link; split at the last = as well)\n"
"  --from TEXT       left side of the next -b, -L or --move, whose argument is then the right side alone\n"
"  -t DIR            an empty tmpfs, mode 1777, at most half of the memory, or --tmp-size SIZE (1g, 20%)\n"
"  -D DIR            a directory, with those above it\n"
"  --closed DIR      a directory that nobody may enter\n"
"  -r DIR            make the mount at DIR, and those below it, read-only\n"
"  --dev DIR         tmpfs with null zero full random urandom tty, links to /proc/self/fd, and pts and shm;\n"
"                    in a template shm is a link to /tmp and pts is empty: boxes must not share them\n"
"  --pts DIR         a devpts of its own\n"
"One directory that the command may change (an overlay: what it changes lands in UPPER alone)\n"
"  --writable PATH   where in the box\n"
"  --lower PATH, --lower-fd FD   what is there before\n"
"  --upper DIR --work DIR        two fresh directories on one file system; UPPER's mode and owner are\n"
"                    those of the writable directory itself\n"
"The command\n"
"  -B BINARY         the file to execute (default: the first word of COMMAND; found on PATH if without /)\n"
"  -d DIR            its working directory (default /)\n"
"  -u UID, -g GID    whom it runs as (default 65534, nobody; never 0)\n"
"  --proc DIR        mount /proc there\n"
"  --net-ns FD       its network; --new-net: a fresh one with loopback only; without: this machine's\n"
"  --hostname NAME, --umask OCT\n"
"  --rlimit NAME=N   as core cpu data fsize memlock nofile nproc stack; N may be `unlimited'\n"
"  --env-fd FD       its whole environment, NAME=VALUE strings each ended by a NUL byte\n"
"  --direct N        COMMAND begins with N words that do what the others, after a word --, are a shell for;\n"
"                    the shell is started only if the first word of all cannot be executed\n"
"  --say TEXT        with --direct: written before, and not by the shell if it is started\n"
"  --enter DIR       with --direct: its working directory\n"
"  --move TO         with --direct and --from FROM: if it succeeds, then `mv -f FROM TO'\n"
"Telling\n"
"  --status-fd FD    12 bytes at the end, little endian: i32 wait status, u64 microseconds of CPU time\n"
"  --error-fd FD     where to say, in one line, why there is no box (default: standard error)\n"
"  -q                do not tell each step on standard error\n"
"  --explain         print the plan and do nothing\n"
"\n"
"Exit status: the command's (128 + N if signal N killed it); 0 with --status-fd; 127 and 126 if it could\n"
"not be executed; 125 if the box could not be made; 2 if these options make no sense.\n"
"mkbox and its box end when the process that started mkbox ends.\n";

static unsigned long number(const char *option, const char *text, int base, unsigned long most)
{
    char *end;
    errno = 0;
    unsigned long value = strtoul(text, &end, base);
    if (*text < '0' || *text > '9' || *end || errno || value > most)
        usage("%s %s: not a number from 0 to %lu", option, text, most);
    return value;
}

static void add_limit(char *text)
{
    static const struct limit known[] = {
        {"as", RLIMIT_AS, 0}, {"core", RLIMIT_CORE, 0}, {"cpu", RLIMIT_CPU, 0}, {"data", RLIMIT_DATA, 0},
        {"fsize", RLIMIT_FSIZE, 0}, {"memlock", RLIMIT_MEMLOCK, 0}, {"nofile", RLIMIT_NOFILE, 0},
        {"nproc", RLIMIT_NPROC, 0}, {"stack", RLIMIT_STACK, 0},
    };
    char *equals = strchr(text, '=');
    if (!equals || opt.limit_count == MAX_LIMITS)
        usage("--rlimit %s: write NAME=N, at most 16 times", text);
    *equals = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(text, known[i].name)) {
            opt.limits[opt.limit_count] = known[i];
            opt.limits[opt.limit_count++].value = strcmp(equals + 1, "unlimited")
                ? number("--rlimit", equals + 1, 10, LONG_MAX) : RLIM_INFINITY;
            return;
        }
    usage("--rlimit %s: not one of as core cpu data fsize memlock nofile nproc stack", text);
}

/* FROM: what --from said before, NULL if nothing: then -b and -L are split at their last =. */
static void add_operation(int option, char *argument, const char *from)
{
    if (opt.operation_count == MAX_STEPS)
        usage("more than %d operations", MAX_STEPS);
    if ((option == 'b' || option == 'L') && !from) {
        char *equals = strrchr(argument, '=');
        if (!equals || equals == argument || !equals[1])
            usage("-%c %s: write %s", option, argument, option == 'b' ? "SRC=DST" : "TARGET=NAME");
        *equals = 0;
        from = argument;
        argument = equals + 1;
    }
    if (!*argument)
        usage("a path in the box is empty");
    opt.operations[opt.operation_count++] = (struct operation){option, argument, from};
}

/* What stands after the separator, the command as it is written, becomes opt.argv. */
static void split_direct(unsigned long count)
{
    unsigned long given = 0;
    while (given <= count && opt.argv[given])
        given++;
    if (given <= count || strcmp(opt.argv[count], "--") || !opt.argv[count + 1])
        usage("--direct %lu: that many words, then --, then the command that they stand for", count);
    opt.argv[count] = NULL;
    opt.direct = opt.argv;
    opt.argv += count + 1;
}

static void check_combination(void)
{
    bool overlay = opt.upper || opt.work || opt.writable || opt.lower || opt.lower_fd >= 0;
    if (!opt.root == (opt.mnt_ns < 0))
        usage("give either -s DIR or --mnt-ns FD as the root of the box");
    if (overlay && !(opt.upper && opt.work && opt.writable && !opt.lower == (opt.lower_fd >= 0)))
        usage("--writable, --upper, --work and one of --lower and --lower-fd go together");
    if (opt.tmpfs_root && !opt.root)
        usage("--tmpfs-root goes with -s DIR");
    if (opt.new_net && opt.net_ns >= 0)
        usage("--new-net and --net-ns exclude each other");
    if (opt.hold && (overlay || opt.proc || opt.new_net || opt.net_ns >= 0 || !opt.root || opt.argv[0]))
        usage("--hold makes a template: -s and what to put into it; overlay, --proc, network and command come later");
    if (!opt.hold && !opt.argv[0])
        usage("no command given");
    if ((opt.says || opt.enter || opt.moved_to) && !opt.direct)
        usage("--say, --enter and --move go with --direct");
    if (opt.uid == 0 || opt.gid == 0)
        usage("a box never runs as root: -u and -g must not be 0");
}

void parse_options(int argc, char **argv)
{
    const char *from = NULL;
    unsigned long direct = 0;
    set_defaults();
    opterr = optind = 0; /* 0: from the beginning; the server's own options may have been parsed before */
    for (int c; (c = getopt_long(argc, argv, "+:s:B:b:t:r:d:D:L:u:g:q", long_options, NULL)) != -1;) {
        switch (c) {
        case 's': opt.root = optarg; break;
        case 'B': opt.program = optarg; break;
        case 'd': opt.directory = optarg; break;
        case 'u': opt.uid = number("-u", optarg, 10, UINT_MAX - 1); break;
        case 'g': opt.gid = number("-g", optarg, 10, UINT_MAX - 1); break;
        case 'q': opt.quiet = true; break;
        case 'b': case 'L': add_operation(c, optarg, from); from = NULL; break;
        case 't': case 'r': case 'D': case OPTION_DEV: case OPTION_PTS: case OPTION_CLOSED:
            add_operation(c, optarg, NULL); break;
        case FROM: from = optarg; break;
        case TMPFS_ROOT: opt.tmpfs_root = true; break;
        case HOLD: opt.hold = true; break;
        case NEW_NET: opt.new_net = true; break;
        case EXPLAIN: opt.explain = true; break;
        case SERVE: opt.serve_fd = number("--serve", optarg, 10, INT_MAX); break;
        case SWEEP: opt.sweep_fd = number("--sweep", optarg, 10, INT_MAX); break;
        case MNT_NS: opt.mnt_ns = number("--mnt-ns", optarg, 10, INT_MAX); break;
        case NET_NS: opt.net_ns = number("--net-ns", optarg, 10, INT_MAX); break;
        case LOWER_FD: opt.lower_fd = number("--lower-fd", optarg, 10, INT_MAX); break;
        case ENV_FD: opt.env_fd = number("--env-fd", optarg, 10, INT_MAX); break;
        case STATUS_FD: opt.status_fd = number("--status-fd", optarg, 10, INT_MAX); break;
        case ERROR_FD: opt.error_fd = number("--error-fd", optarg, 10, INT_MAX); break;
        case LOWER: opt.lower = optarg; break;
        case UPPER: opt.upper = optarg; break;
        case WORK: opt.work = optarg; break;
        case WRITABLE: opt.writable = optarg; break;
        case PROC: opt.proc = optarg; break;
        case UMASK: opt.umask = number("--umask", optarg, 8, 0777); break;
        case HOSTNAME: opt.hostname = optarg; break;
        case RLIMIT: add_limit(optarg); break;
        case DIRECT: direct = number("--direct", optarg, 10, INT_MAX); break;
        case SAY: opt.says = optarg; break;
        case ENTER: opt.enter = optarg; break;
        case MOVE:
            if (!from)
                usage("--move %s: --from, before it, says what", optarg);
            opt.moved = from;
            opt.moved_to = optarg;
            from = NULL;
            break;
        case TMP_SIZE:
            if (!*optarg || strspn(optarg, "0123456789kKmMgG%") != strlen(optarg))
                usage("--tmp-size %s: write a size such as 512m, 2g or 20%%", optarg);
            opt.tmp_size = optarg;
            break;
        case VERSION: puts("termite-mkbox " TERMITE_VERSION); exit(0);
        case HELP: fputs(help, stdout); exit(0);
        case ':': usage("%s wants an argument", argv[optind - 1]);
        default:
            if (optopt && optopt < OPTION_DEV)
                usage("unknown option -%c", optopt);
            usage("unknown option %s", argv[optind - 1]);
        }
    }
    if (from)
        usage("--from must be followed by -b, -L or --move");
    opt.argv = argv + optind;
    if (opt.serve_fd >= 0 || opt.sweep_fd >= 0) {
        if (argc != 3)
            usage("%s FD goes with no other option", opt.serve_fd >= 0 ? "--serve" : "--sweep");
        return;
    }
    if (direct)
        split_direct(direct);
    check_combination();
}
