/* The sweeper: one process that removes what ended tasks have left, so that nobody waits for it.

   It reads packets from a SOCK_SEQPACKET socket; each is the path of a directory, which it removes with all
   that is in it, following no link.  What it cannot remove it leaves.  It answers nothing, and ends when
   the socket has ended and all is done. */

#define _GNU_SOURCE
#include "mkbox.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static void remove_tree(int parent, const char *name);

/* FD is closed. */
static void remove_contents(int fd)
{
    DIR *directory = fdopendir(fd);
    if (!directory) {
        close(fd);
        return;
    }
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (entry->d_type == DT_DIR || (unlinkat(fd, entry->d_name, 0) < 0 && errno == EISDIR))
            remove_tree(fd, entry->d_name);
    }
    closedir(directory);
}

/* A directory that is empty, as most are here, is gone at the first call. */
static void remove_tree(int parent, const char *name)
{
    if (unlinkat(parent, name, AT_REMOVEDIR) == 0 || (errno != ENOTEMPTY && errno != EEXIST))
        return;
    int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    int fd = openat(parent, name, flags);
    if (fd < 0 && errno == EACCES && fchmodat(parent, name, 0700, 0) == 0)
        fd = openat(parent, name, flags);
    if (fd < 0)
        return;
    remove_contents(fd);
    unlinkat(parent, name, AT_REMOVEDIR);
}

_Noreturn void sweep(int socket)
{
    static char path[PATH_MAX];
    for (ssize_t size; (size = recv(socket, path, sizeof path - 1, 0)) != 0;) {
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0)
            break;
        path[size] = 0;
        remove_tree(AT_FDCWD, path);
    }
    _exit(0);
}
