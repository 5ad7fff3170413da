/* Which steps make this box, and in which order: the one place that decides it. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct step plan[MAX_STEPS];
static int step_count;

static struct step *add(const struct verb *verb, const char *path, const char *from)
{
    if (step_count == MAX_STEPS)
        usage("the plan has more than %d steps", MAX_STEPS);
    plan[step_count] = (struct step){.verb = verb, .path = path, .from = from, .fd = -1};
    return &plan[step_count++];
}

/* Two steps: SOURCE is a path out here, PATH one in the box. */
static void add_bind(const char *path, const char *source)
{
    struct step *taken = add(&DO_TAKE, source, NULL);
    add(&DO_BIND, path, source)->source = taken;
}

static const char *below(const char *directory, const char *name)
{
    char *path;
    if (asprintf(&path, "%s/%s", directory, name) < 0)
        fail(ENOMEM, "cannot plan %s", name);
    return path;
}

/* A template's mounts are shared by all boxes made from it, so it gets no pts, and /tmp as its shm. */
static void add_devices(const char *dev)
{
    static const char *const nodes[] = {
        "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"};
    static const char *const links[][2] = {{"fd", "/proc/self/fd"}, {"stdin", "/proc/self/fd/0"},
        {"stdout", "/proc/self/fd/1"}, {"stderr", "/proc/self/fd/2"}, {"ptmx", "pts/ptmx"}};
    add(&DO_DEVICES, dev, NULL);
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
        add_bind(below(dev, nodes[i] + strlen("/dev/")), nodes[i]);
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        add(&DO_LINK, below(dev, links[i][0]), links[i][1]);
    if (opt.hold) {
        add(&DO_LINK, below(dev, "shm"), "/tmp");
        add(&DO_MKDIR, below(dev, "pts"), NULL);
    } else {
        add(&DO_TMPFS, below(dev, "shm"), opt.tmp_size);
        add(&DO_DEVPTS, below(dev, "pts"), NULL);
    }
}

static void add_requested(const struct operation *operation)
{
    switch (operation->option) {
    case 'b': add_bind(operation->path, operation->from); break;
    case 'L': add(&DO_LINK, operation->path, operation->from); break;
    case 't': add(&DO_TMPFS, operation->path, opt.tmp_size); break;
    case 'r': add(&DO_READ_ONLY, operation->path, NULL); break;
    case 'D': add(&DO_MKDIR, operation->path, NULL); break;
    case OPTION_DEV: add_devices(operation->path); break;
    case OPTION_CLOSED: add(&DO_CLOSED, operation->path, NULL); break;
    case OPTION_PTS: add(&DO_DEVPTS, operation->path, NULL); break;
    }
}

/* The steps of one stage keep this order; which stage a step belongs to is its verb's matter. */
void build_plan(void)
{
    static char whom[64], umask[8];
    step_count = 0;
    if (!opt.quiet || opt.explain) { /* otherwise nobody reads them */
        snprintf(whom, sizeof whom, "user %u and group %u", opt.uid, opt.gid);
        snprintf(umask, sizeof umask, "%03o", opt.umask & 0777);
    }
    struct step *overlay = opt.upper ? add(&DO_OVERLAY, opt.upper, opt.work) : NULL;
    add(&DO_UNSHARE, opt.hold ? "mount" : opt.new_net ? "mount, IPC, UTS, PID, network" : "mount, IPC, UTS, PID", NULL);
    if (opt.root)
        add(&DO_ROOT, opt.root, opt.tmpfs_root ? "tmpfs mounted on it" : NULL);
    for (int i = 0; i < opt.operation_count; i++)
        add_requested(&opt.operations[i]);
    if (overlay)
        add(&DO_WRITE, opt.writable, NULL)->source = overlay;
    if (opt.root && opt.proc)
        add(&DO_MKDIR, opt.proc, NULL);
    if (opt.hostname)
        add(&DO_HOSTNAME, opt.hostname, NULL);
    if (opt.new_net)
        add(&DO_NET_UP, "lo", NULL);
    if (opt.root)
        add(&DO_SEAL, "/", NULL);
    if (opt.net_ns >= 0)
        add(&DO_JOIN_NET, NULL, NULL);
    if (opt.mnt_ns >= 0)
        add(&DO_JOIN_MNT, NULL, NULL); /* last of HERE: nothing out here can be found any more */
    if (opt.hold)
        return;
    if (opt.proc)
        add(&DO_PROC, opt.proc, NULL);
    if (opt.limit_count)
        add(&DO_LIMIT, NULL, NULL);
    add(&DO_DROP, whom, NULL);
    add(&DO_CHDIR, opt.directory, NULL);
    add(&DO_UMASK, opt.umask < 0 ? "(as it was)" : umask, NULL);
}

static void describe(int fd, const char *prefix, const struct step *step)
{
    char text[LINE_BYTES];
    const struct verb *verb = step->verb;
    int n = snprintf(text, sizeof text, "%s%s", prefix, verb->says);
    if (step->path)
        n += snprintf(text + n, sizeof text - n, " %s", step->path);
    if (step->from && n < LINE_BYTES)
        snprintf(text + n, sizeof text - n, "%s %s", verb->about, step->from);
    write_line(fd, text);
}

void run_stage(enum stage stage)
{
    for (struct step *step = plan; step < plan + step_count; step++)
        if (step->verb->stage == stage) {
            if (!opt.quiet)
                describe(STDERR_FILENO, "mkbox: ", step);
            step->verb->execute(step);
        }
}

void explain_plan(void)
{
    static const char *const titles[] = {"Out here, first:", "Then, in the box:", "Then, as process 1 of the box:"};
    for (enum stage stage = HERE; stage <= AS_INIT; stage++) {
        bool titled = false;
        for (struct step *step = plan; step < plan + step_count; step++)
            if (step->verb->stage == stage) {
                if (!titled)
                    write_line(STDOUT_FILENO, titles[stage]);
                titled = true;
                describe(STDOUT_FILENO, "  ", step);
            }
    }
    write_line(STDOUT_FILENO, opt.hold ? "Then say ready and keep it until standard input ends."
                                       : "Then run the command; when it has ended, kill whatever it left.");
}
