/* Every step that can stand in a plan: what it says of itself, and what it does. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000 /* in <linux/fcntl.h>, which <fcntl.h> does not get along with */
#endif

/* -- one wrapper per system call; what fails here says on which path ---------------------------- */

static void make_dirs(const char *path, bool last_too)
{
    char part[PATH_MAX];
    if (strlen(path) >= sizeof part)
        fail(ENAMETOOLONG, "cannot make the directory %s", path);
    strcpy(part, path);
    for (char *c = part + 1;; c++) {
        if (*c && *c != '/')
            continue;
        bool at_end = !*c;
        if (at_end && !last_too)
            return;
        *c = 0;
        int error = mkdir(part, 0755) < 0 ? errno : 0;
        if (error && error != EEXIST && access(part, F_OK) < 0) /* EROFS and such do not tell that it exists */
            fail(error, "cannot make the directory %s in the box", part);
        if (at_end)
            return;
        *c = '/';
    }
}

static void make_file(const char *path)
{
    make_dirs(path, false);
    int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
    if (fd < 0)
        fail(errno, "cannot make the mount point %s in the box", path);
    close(fd);
}

static void mount_on(const char *path, const char *type, unsigned long flags, const char *data, bool create)
{
    if (mount(type, path, type, flags, data) == 0)
        return;
    if (errno == ENOENT && create) {
        make_dirs(path, true);
        mount_on(path, type, flags, data, false);
    } else
        fail(errno, "cannot mount %s on %s", type, path);
}

/* A copy of the mount at PATH that hangs nowhere yet, cut off from whatever is mounted there later. */
static int take_tree(const char *path)
{
    int fd = open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
    if (fd < 0)
        fail(errno, "cannot take %s to bind it", path);
    struct mount_attr private = {.propagation = MS_PRIVATE};
    if (mount_setattr(fd, "", AT_EMPTY_PATH | AT_RECURSIVE, &private, sizeof private) < 0)
        fail(errno, "cannot make %s private", path);
    return fd;
}

static void attach(int tree, const char *path)
{
    if (move_mount(tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH) == 0)
        return;
    struct stat st;
    if (errno != ENOENT || fstat(tree, &st) < 0)
        fail(errno, "cannot mount on %s", path);
    if (S_ISDIR(st.st_mode))
        make_dirs(path, true);
    else
        make_file(path);
    if (move_mount(tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH) < 0)
        fail(errno, "cannot mount on %s", path);
}

static void set_mount_flags(const char *path, unsigned scope, uint64_t flags)
{
    struct mount_attr attributes = {.attr_set = flags};
    if (mount_setattr(AT_FDCWD, path, scope, &attributes, sizeof attributes) < 0)
        fail(errno, "cannot make %s read-only%s", path, errno == EINVAL ? "; it is no mount point, bind it first" : "");
}

/* VALUE NULL: a flag.  Newer kernels leave their own words about a refusal to be read from FD. */
static void configure(int fd, unsigned command, const char *key, const char *value)
{
    if (fsconfig(fd, command, key, value, 0) == 0)
        return;
    int error = errno;
    char said[512];
    ssize_t n = read(fd, said, sizeof said - 1);
    said[n > 0 ? n - 1 : 0] = 0; /* without its newline */
    const char *hint = error == EINVAL ? "; each box needs fresh directories of its own, on one file system that is no"
                                         " overlay and no network file system; dmesg tells more" : "";
    fail(0, "cannot set up the overlay of %s and %s (%s%s%s): %s%s%s%s%s", opt.upper, opt.work, key ? key : "mount",
         value ? "=" : "", value ? value : "", strerror(error), hint, advice(error), n > 0 ? "; " : "", said);
}

static void join(int fd, int kind, const char *option)
{
    if (setns(fd, kind) < 0)
        fail(errno, "cannot enter the namespace of %s %d", option, fd);
}

static void enter_directory(const char *path)
{
    if (chdir(path) < 0)
        fail(errno, "cannot enter the working directory %s in the box", path);
}

/* -- the steps ------------------------------------------------------------------------------------ */

static void take_source(struct step *step)
{
    step->fd = take_tree(step->path);
}

/* By hand, because the first snprintf() of a process costs as much as a mount. */
static const char *path_of(int fd, char path[32])
{
    char digits[12], *at = stpcpy(path, "/proc/self/fd/");
    int count = 0;
    do
        digits[count++] = '0' + fd % 10;
    while (fd /= 10);
    while (count)
        *at++ = digits[--count];
    *at = 0;
    return path;
}

/* The overlay is made while u and w, relative to the working directory, can be found, and the lower
   directory goes in as /proc/self/fd/N: so no path stands in an option that would give , : or \ a
   meaning of its own.
     volatile         no fsync of the upper file system when the box ends; the directories are used once
     redirect_dir=on  renaming a directory of the lower tree works (EXDEV otherwise)
     metacopy=off     a changed mode or time copies the file up whole: upper files are always complete
     index=off        no record of hard links across boxes; it would want file handles, FUSE has none
     xino=off         inode numbers stay small (on: beyond 2^63, which old programs refuse); they stay the
                      same when a file is copied up, but files of the lower tree show an st_dev of their own */
static void open_overlay(struct step *step)
{
    char lower[32];
    int lower_fd = opt.lower ? open(opt.lower, O_PATH | O_DIRECTORY | O_CLOEXEC) : opt.lower_fd;
    if (lower_fd < 0)
        fail(errno, "cannot open the lower directory %s", opt.lower);
    int fd = fsopen("overlay", FSOPEN_CLOEXEC);
    if (fd < 0)
        fail(errno, "cannot set up an overlay");
    configure(fd, FSCONFIG_SET_STRING, "lowerdir", path_of(lower_fd, lower));
    configure(fd, FSCONFIG_SET_STRING, "upperdir", opt.upper);
    configure(fd, FSCONFIG_SET_STRING, "workdir", opt.work);
    configure(fd, FSCONFIG_SET_STRING, "redirect_dir", "on");
    configure(fd, FSCONFIG_SET_STRING, "metacopy", "off");
    configure(fd, FSCONFIG_SET_STRING, "index", "off");
    configure(fd, FSCONFIG_SET_STRING, "xino", "off");
    configure(fd, FSCONFIG_SET_FLAG, "volatile", NULL);
    configure(fd, FSCONFIG_CMD_CREATE, NULL, NULL);
    step->fd = fsmount(fd, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    if (step->fd < 0)
        fail(errno, "cannot mount the overlay of %s", opt.upper);
}

static void join_network(struct step *step)
{
    (void)step;
    join(opt.net_ns, CLONE_NEWNET, "--net-ns");
}

/* Joining a mount namespace also makes its root this process's root and working directory. */
static void join_template(struct step *step)
{
    (void)step;
    join(opt.mnt_ns, CLONE_NEWNS, "--mnt-ns");
}

/* The new PID namespace is made by clone(), with its first process. */
static void unshare_all(struct step *step)
{
    (void)step;
    int kinds = opt.hold ? CLONE_NEWNS : CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | (opt.new_net ? CLONE_NEWNET : 0);
    if (unshare(kinds) < 0)
        fail(errno, "cannot make new namespaces");
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        fail(errno, "cannot make the mounts private");
}

/* Through the new mount's own descriptor, because for DIR=/ its path still leads to the old one. */
static void enter_root(struct step *step)
{
    if (opt.tmpfs_root) {
        mount_on(step->path, "tmpfs", 0, "mode=0755", false);
        enter_directory(step->path);
    } else {
        int tree = take_tree(step->path);
        attach(tree, step->path);
        if (fchdir(tree) < 0)
            fail(errno, "cannot enter the root %s", step->path);
    }
    if (syscall(SYS_pivot_root, ".", ".") < 0)
        fail(errno, "cannot make %s the root; is this machine's root an initramfs?", step->path);
    if (umount2(".", MNT_DETACH) < 0)
        fail(errno, "cannot let go of the old root");
    enter_directory("/");
}

static void make_directory(struct step *step)
{
    make_dirs(step->path, true);
}

static void make_closed(struct step *step)
{
    make_dirs(step->path, true);
    if (chmod(step->path, 0) < 0)
        fail(errno, "cannot close the directory %s", step->path);
}

static void mount_tmpfs(struct step *step)
{
    char data[64] = "mode=1777";
    if (opt.tmp_size)
        snprintf(data, sizeof data, "mode=1777,size=%s", opt.tmp_size);
    mount_on(step->path, "tmpfs", MS_NOSUID | MS_NODEV, data, true);
}

static void mount_dev(struct step *step)
{
    mount_on(step->path, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755,size=64k,nr_inodes=64", true);
}

static void mount_pts(struct step *step)
{
    mount_on(step->path, "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0600", true);
}

static void bind_source(struct step *step)
{
    attach(step->source->fd, step->path);
}

static void make_link(struct step *step)
{
    if (symlink(step->from, step->path) == 0)
        return;
    if (errno == ENOENT) {
        make_dirs(step->path, false);
        if (symlink(step->from, step->path) == 0)
            return;
    }
    fail(errno, "cannot make the symlink %s", step->path);
}

static void make_read_only(struct step *step)
{
    set_mount_flags(step->path, AT_RECURSIVE, MOUNT_ATTR_RDONLY);
}

static void seal_root(struct step *step)
{
    set_mount_flags(step->path, 0, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
}

static void set_hostname(struct step *step)
{
    if (sethostname(step->path, strlen(step->path)) < 0)
        fail(errno, "cannot set the host name %s", step->path);
}

static void raise_loopback(struct step *step)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        fail(errno, "cannot bring up the network interface %s", step->path);
    close(fd);
}

/* /proc shows the PID namespace of whoever mounts it, so only init can. */
static void mount_proc(struct step *step)
{
    mount_on(step->path, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL, false);
}

static void set_limits(struct step *step)
{
    (void)step;
    for (int i = 0; i < opt.limit_count; i++) {
        struct rlimit limit = {opt.limits[i].value, opt.limits[i].value};
        if (setrlimit(opt.limits[i].resource, &limit) < 0)
            fail(errno == EPERM ? 0 : errno, "cannot set the limit %s%s", opt.limits[i].name,
                 errno == EPERM ? ": it is above what this process may have itself" : "");
    }
}

static bool bounding_set_dropped;

void drop_bounding_set(void)
{
    for (int capability = 0; prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0; capability++)
        ;
    if (errno != EINVAL)
        fail(errno, "cannot drop the capability bounding set");
    bounding_set_dropped = true;
}

/* The bounding set while CAP_SETPCAP is still there, the groups while CAP_SETGID is; changing the
   user empties the effective, permitted and ambient sets, capset the inheritable one. */
static void drop_privileges(struct step *step)
{
    (void)step;
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    if (!bounding_set_dropped)
        drop_bounding_set();
    if (setgroups(0, NULL) < 0)
        fail(errno, "cannot leave the supplementary groups");
    if (setresgid(opt.gid, opt.gid, opt.gid) < 0)
        fail(errno, "cannot become group %u", opt.gid);
    if (setresuid(opt.uid, opt.uid, opt.uid) < 0)
        fail(errno, "cannot become user %u", opt.uid);
    if (syscall(SYS_capset, &header, none) < 0)
        fail(errno, "cannot drop all capabilities");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        fail(errno, "cannot set no_new_privs");
}

static void change_directory(struct step *step)
{
    enter_directory(step->path);
}

static void set_umask(struct step *step)
{
    (void)step;
    umask(opt.umask);
}

const struct verb
    DO_TAKE = {HERE, "open the tree", NULL, take_source},
    DO_OVERLAY = {HERE, "set up an overlay whose changes go to", ", its scratch directory being", open_overlay},
    DO_JOIN_NET = {HERE, "join the network namespace of --net-ns", NULL, join_network},
    DO_JOIN_MNT = {HERE, "join the mount namespace of --mnt-ns", NULL, join_template},
    DO_UNSHARE = {INSIDE, "make new namespaces, cut off from this machine:", NULL, unshare_all},
    DO_ROOT = {INSIDE, "let go of this machine's root; the new one is", ", an empty", enter_root},
    DO_MKDIR = {INSIDE, "make the directory", NULL, make_directory},
    DO_CLOSED = {INSIDE, "make the directory, which nobody may enter:", NULL, make_closed},
    DO_TMPFS = {INSIDE, "mount an empty tmpfs on", ", at most", mount_tmpfs},
    DO_DEVICES = {INSIDE, "mount a small tmpfs for device files on", NULL, mount_dev},
    DO_DEVPTS = {INSIDE, "mount a devpts of its own on", NULL, mount_pts},
    DO_BIND = {INSIDE, "bind on", " the tree", bind_source},
    DO_LINK = {INSIDE, "make the symlink", " ->", make_link},
    DO_READ_ONLY = {INSIDE, "make read-only, with all mounts below:", NULL, make_read_only},
    DO_WRITE = {INSIDE, "mount the overlay on", NULL, bind_source},
    DO_HOSTNAME = {INSIDE, "set the host name to", NULL, set_hostname},
    DO_NET_UP = {INSIDE, "bring up the network interface", NULL, raise_loopback},
    DO_SEAL = {INSIDE, "make read-only, without set-uid programs and devices:", NULL, seal_root},
    DO_PROC = {AS_INIT, "mount proc on", NULL, mount_proc},
    DO_LIMIT = {AS_INIT, "set the resource limits", NULL, set_limits},
    DO_DROP = {AS_INIT, "drop all groups, capabilities and ways to new ones; become", NULL, drop_privileges},
    DO_CHDIR = {AS_INIT, "enter the working directory", NULL, change_directory},
    DO_UMASK = {AS_INIT, "set the umask", NULL, set_umask};
