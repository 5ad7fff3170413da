/* The loop of a mirror's FUSE threads: reads the kernel's requests and has libfuse 2 answer them.

   Opening a directory is what a command asks for most often once everything is known: the C library looks for
   messages in its language each time a program starts.  Kernels since 5.1 do not ask again after the answer "not
   implemented", and keep what a directory holds.  libfuse, however, gives each open directory a buffer, and finds it
   in the request that reads the directory.  So the one answer is given here, and each such request gets a buffer of
   its own: libfuse is made to open the directory, and afterwards to close it, on a channel that leads nowhere.

   libfuse's functions are passed in, so that this needs neither its headers nor its library to be built. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* linux/fuse.h */
enum { OPENDIR = 27, READDIR = 28, RELEASEDIR = 29 };
enum { ROOT = 1 };

struct in_header {
    uint32_t length, opcode;
    uint64_t unique, node;
    uint32_t uid, gid, pid, padding;
};

struct out_header {
    uint32_t length;
    int32_t error;
    uint64_t unique;
};

struct open_in { /* fuse_open_in */
    struct in_header head;
    uint32_t flags, unused;
};

struct readdir_in { /* fuse_read_in, its first field */
    struct in_header head;
    uint64_t handle;
};

struct release_in { /* fuse_release_in */
    struct in_header head;
    uint64_t handle;
    uint32_t flags, release_flags;
    uint64_t lock_owner;
};

/* What Python hands over; its layout stands in termite/mirror/fuse.py, too. */
struct loop {
    void *session, *channel;
    void (*process)(void *session, const char *request, size_t length, void *channel);
    void *(*new_channel)(const void *operations, int fd, size_t size, void *data);
    void (*destroy_channel)(void *channel);
    size_t buffer_size;
    int device;
    int opens_directories; /* the kernel is too old for that answer */
};

struct channel_operations { /* fuse_chan_ops */
    int (*receive)(void **channel, char *buffer, size_t size);
    int (*send)(void *channel, const struct iovec pieces[], size_t count);
    void (*destroy)(void *channel);
};

/* What libfuse last said on this thread's channel to nowhere. */
static _Thread_local struct {
    struct out_header head;
    uint64_t handle;
} said;

static int keep(void *channel, const struct iovec pieces[], size_t count)
{
    (void)channel;
    char *at = (char *)&said;
    size_t room = sizeof said;
    for (size_t i = 0; i < count; i++) {
        size_t part = pieces[i].iov_len < room ? pieces[i].iov_len : room;
        memcpy(at, pieces[i].iov_base, part);
        at += part;
        room -= part;
    }
    return 0;
}

static void refuse(const struct loop *loop, uint64_t unique, int error)
{
    struct out_header answer = {sizeof answer, -error, unique};
    /* Fails when the mount is gone, and with it whoever asked. */
    if (write(loop->device, &answer, sizeof answer) < 0)
        return;
}

static void read_directory(const struct loop *loop, void *nowhere, char *request, size_t length)
{
    struct readdir_in *asked = (struct readdir_in *)request;
    struct open_in open = {.head = asked->head};
    open.head.opcode = OPENDIR;
    open.head.length = sizeof open;
    said.head.error = -EIO;
    loop->process(loop->session, (char *)&open, sizeof open, nowhere);
    if (said.head.error) {
        refuse(loop, asked->head.unique, -said.head.error);
        return;
    }
    struct release_in release = {.head = asked->head, .handle = said.handle};
    asked->handle = said.handle;
    loop->process(loop->session, request, length, loop->channel);
    release.head.opcode = RELEASEDIR;
    release.head.node = ROOT; /* the other may be gone by now, with whoever read the directory */
    release.head.length = sizeof release;
    loop->process(loop->session, (char *)&release, sizeof release, nowhere);
}

/* Returns when the mount is gone: 0, or an errno if it went in an unexpected way. */
int termite_fuse_loop(const struct loop *loop)
{
    static const struct channel_operations operations = {.send = keep};
    char *buffer = malloc(loop->buffer_size);
    void *nowhere = loop->new_channel(&operations, -1, loop->buffer_size, NULL);
    int error = buffer && nowhere ? 0 : ENOMEM;
    while (!error) {
        ssize_t length = read(loop->device, buffer, loop->buffer_size);
        const struct in_header *head = (struct in_header *)buffer;
        if (length < 0 && (errno == EINTR || errno == EAGAIN || errno == ENOENT)) /* ENOENT: it was withdrawn */
            continue;
        if (length < 0)
            error = errno;
        else if ((size_t)length < sizeof *head)
            error = EIO;
        else if (head->opcode == OPENDIR && !loop->opens_directories)
            refuse(loop, head->unique, ENOSYS);
        else if (head->opcode == READDIR && !loop->opens_directories && (size_t)length >= sizeof(struct readdir_in))
            read_directory(loop, nowhere, buffer, length);
        else
            loop->process(loop->session, buffer, length, loop->channel);
    }
    if (nowhere)
        loop->destroy_channel(nowhere);
    free(buffer);
    return error == ENODEV ? 0 : error;
}
