/* One number for all that lstat says of a directory and of everything in it, computed without an interpreter.

   The master compares it with the last one to see which directories it has to look at again (attr/fingerprint.py).
   Names, inodes, modes, owners, sizes, times and link counts go into it; their order does not. */

#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct fingerprint {
    uint64_t low, high;
    int64_t newest_ns; /* the latest change of an inode among them; -1: the directory cannot be read */
};

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

static int64_t nanoseconds(struct timespec when)
{
    return when.tv_sec * INT64_C(1000000000) + when.tv_nsec;
}

static void add(struct fingerprint *sum, const char *name, const struct stat *st)
{
    const uint64_t fields[] = {st->st_ino, st->st_dev, st->st_mode, (uint64_t)st->st_uid << 32 | st->st_gid,
                               st->st_nlink, st->st_size, nanoseconds(st->st_mtim), nanoseconds(st->st_ctim)};
    uint64_t low = 1, high = 2;
    for (; *name; name++)
        low = mix(low, (unsigned char)*name);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        low = mix(low, fields[i]);
        high = mix(high, low + fields[i]);
    }
    sum->low += low;
    sum->high += high;
    if (nanoseconds(st->st_ctim) > sum->newest_ns)
        sum->newest_ns = nanoseconds(st->st_ctim);
}

static void look(const char *path, struct fingerprint *sum)
{
    struct stat st;
    *sum = (struct fingerprint){0, 0, -1};
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (!directory) {
        if (fd >= 0)
            close(fd);
        return;
    }
    if (fstat(fd, &st) == 0)
        add(sum, "", &st);
    for (struct dirent *entry; (entry = readdir(directory));)
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
            fstatat(fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0)
            add(sum, entry->d_name, &st);
    closedir(directory);
}

/* PATHS: COUNT strings, each ended by a NUL byte. */
void termite_fingerprints(const char *paths, size_t count, struct fingerprint *into)
{
    for (size_t i = 0; i < count; i++, paths += strlen(paths) + 1)
        look(paths, &into[i]);
}
