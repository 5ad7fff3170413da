/* Which names in a directory may have changed since the last look, found out without an interpreter.

   Of every name a mark is kept: a number for the name and one for all that lstat says of it.  The master keeps them
   (attr/fingerprint.py), hands them back at the next look, and is told the names whose marks are not what they were.
   The directory itself is among them, with an empty name. */

#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { STRETCH_NS = 1000000 };

struct mark {
    uint64_t name;
    uint64_t state; /* 0: it may change again without looking different */
};

struct entry {
    struct mark mark;
    size_t name; /* where in `names` */
};

/* One directory that has to be looked at; what is counted here follows it. */
struct record {
    uint64_t number; /* among the directories asked for */
    uint64_t marks;  /* bytes of marks, sorted; none: the directory cannot be read */
    uint64_t moved;  /* bytes of names that are new or may have changed, each ended by NUL */
    uint64_t names;  /* bytes of all names, if some may be gone, each ended by NUL */
};

struct buffer {
    char *data;
    size_t used, size;
};

struct settled {
    int64_t before_ns;        /* what changed earlier than this would look different if it changed again */
    int64_t coarse_before_ns; /* the same, where the file system counts whole seconds */
};

static bool append(struct buffer *to, const void *data, size_t length)
{
    if (to->used + length > to->size) {
        size_t size = 2 * (to->used + length) + 4096;
        char *grown = realloc(to->data, size);
        if (!grown)
            return false;
        to->data = grown;
        to->size = size;
    }
    memcpy(to->data + to->used, data, length);
    to->used += length;
    return true;
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

static int64_t nanoseconds(struct timespec when)
{
    return when.tv_sec * INT64_C(1000000000) + when.tv_nsec;
}

/* Whoever waits for this processor gets it once in a millisecond: the master's event loop would otherwise wait for
   the scheduler's tick.  The look takes 7 % longer for it. */
static void pause_now_and_then(void)
{
    static _Thread_local int64_t since_ns;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (nanoseconds(now) - since_ns < STRETCH_NS)
        return;
    nanosleep(&(struct timespec){.tv_nsec = 1}, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    since_ns = nanoseconds(now);
}

static struct mark mark_of(const char *name, const struct stat *st, const struct settled *settled)
{
    const uint64_t fields[] = {st->st_ino, st->st_dev, st->st_mode, (uint64_t)st->st_uid << 32 | st->st_gid,
                               st->st_nlink, st->st_size, nanoseconds(st->st_mtim), nanoseconds(st->st_ctim)};
    struct mark mark = {1, 0};
    for (const char *c = name; *c; c++)
        mark.name = mix(mark.name, (unsigned char)*c);
    if (nanoseconds(st->st_ctim) >= (st->st_ctim.tv_nsec ? settled->before_ns : settled->coarse_before_ns))
        return mark;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        mark.state = mix(mark.state, fields[i]);
    mark.state |= !mark.state;
    return mark;
}

static bool add(struct buffer *entries, struct buffer *names, const char *name, const struct stat *st,
                const struct settled *settled)
{
    struct entry entry = {mark_of(name, st, settled), names->used};
    return append(names, name, strlen(name) + 1) && append(entries, &entry, sizeof entry);
}

static int by_name(const void *a, const void *b)
{
    uint64_t one = ((const struct entry *)a)->mark.name, other = ((const struct entry *)b)->mark.name;
    return (one > other) - (one < other);
}

/* All entries, the directory's own first; false: it cannot be read. */
static bool list(const char *path, struct buffer *entries, struct buffer *names, const struct settled *settled)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (!directory) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    entries->used = names->used = 0;
    bool ok = fstat(fd, &st) == 0 && add(entries, names, "", &st, settled);
    for (struct dirent *entry; ok && (entry = readdir(directory)); pause_now_and_then())
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
            fstatat(fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0)
            ok = add(entries, names, entry->d_name, &st, settled);
    closedir(directory);
    return ok;
}

/* Appends a record if there is anything to look at. */
static bool compare(struct buffer *found, uint64_t number, const struct buffer *entries, const struct buffer *names,
                    const struct mark *old, size_t old_count)
{
    struct entry *entry = (struct entry *)entries->data;
    const size_t count = entries->used / sizeof *entry, at = found->used;
    struct record record = {number, count * sizeof entry->mark, 0, 0};
    const struct mark *end = old + old_count;
    bool gone = false;
    qsort(entry, count, sizeof *entry, by_name);
    if (!append(found, &record, sizeof record))
        return false;
    for (size_t i = 0; i < count; i++)
        if (!append(found, &entry[i].mark, sizeof entry->mark))
            return false;
    for (size_t i = 0; i < count; i++) {
        const char *name = names->data + entry[i].name;
        for (; old < end && old->name < entry[i].mark.name; old++)
            gone = true;
        bool known = old < end && old->name == entry[i].mark.name;
        if (!known || old->state != entry[i].mark.state || !old->state) {
            if (!append(found, name, strlen(name) + 1))
                return false;
            record.moved += strlen(name) + 1;
            gone |= !*name;
        }
        old += known;
    }
    if (gone || old < end) {
        if (!append(found, names->data, names->used))
            return false;
        record.names = names->used;
    } else if (!record.moved) {
        found->used = at;
        return true;
    }
    memcpy(found->data + at, &record, sizeof record);
    return true;
}

/* PATHS: COUNT strings, each ended by a NUL byte.  MARKS: those of all of them one after the other, MARK_COUNTS of each.
   Returns records of what has to be looked at, to be given to termite_free; NULL: out of memory. */
void *termite_changes(const char *paths, size_t count, const struct mark *marks, const uint64_t *mark_counts,
                      int64_t settled_before_ns, int64_t coarse_before_ns, size_t *length)
{
    const struct settled settled = {settled_before_ns, coarse_before_ns};
    struct buffer entries = {0}, names = {0}, found = {malloc(4096), 0, 4096};
    bool ok = found.data;
    for (size_t i = 0; ok && i < count; paths += strlen(paths) + 1, marks += mark_counts[i++])
        if (list(paths, &entries, &names, &settled))
            ok = compare(&found, i, &entries, &names, marks, mark_counts[i]);
        else
            ok = append(&found, &(struct record){.number = i}, sizeof(struct record));
    free(entries.data);
    free(names.data);
    if (!ok) {
        free(found.data);
        return NULL;
    }
    *length = found.used;
    return found.data;
}

void termite_free(void *found)
{
    free(found);
}
