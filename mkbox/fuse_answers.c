/* Attributes and contents that the kernel is about to ask for, answered without waking the interpreter.

   What has changed the kernel is told to forget, and the next command asks for it again: half a dozen questions per
   compile, for which Python, whose code the compiler has meanwhile pushed out of the caches, takes 0.1 ms each.  So
   the view leaves the answers here beforehand, and where the contents lie that a command has just made: objects are
   linked and programs run soon after.  Whatever is not here is asked of Python.

   Each answer says whether it was given: the view must know which size the kernel believes in (see mirror/view.py),
   and contents are read from here only if it is the size that was told with them. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SLOTS = 8192, BLOCK = 4096 };

struct answer {
    struct answer *next;
    int64_t told; /* the size that was answered; -1: nothing yet */
    struct stat st; /* st_mode 0: there is nothing of that name */
    char *contents; /* a file that holds them for as long as it is there; NULL: Python knows where they are */
    char path[];
};

/* The beginning of libfuse's struct fuse_context. */
struct context {
    void *fuse;
    uid_t uid;
    gid_t gid;
    pid_t pid;
    void *private_data;
};

struct answers {
    pthread_mutex_t lock;
    int (*ask)(const char *path, struct stat *st);
    int (*ask_contents)(const char *path, char *buffer, size_t size, off_t offset, void *info);
    int64_t reads, read_bytes;
    struct answer *slots[SLOTS];
};

static struct context *(*get_context)(void);

static struct answer **find(struct answers *answers, const char *path)
{
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (const char *c = path; *c; c++)
        hash = (hash ^ (unsigned char)*c) * 1099511628211u;
    struct answer **at = &answers->slots[(hash ^ hash >> 32) % SLOTS];
    while (*at && strcmp((*at)->path, path))
        at = &(*at)->next;
    return at;
}

static void release(struct answer *answer)
{
    free(answer->contents);
    free(answer);
}

/* ASK and ASK_CONTENTS are libfuse's getattr and read operations, in Python.  NULL: no memory. */
struct answers *termite_answers_new(int (*ask)(const char *, struct stat *),
                                    int (*ask_contents)(const char *, char *, size_t, off_t, void *),
                                    struct context *(*context)(void))
{
    struct answers *answers = calloc(1, sizeof *answers);
    if (!answers)
        return NULL;
    pthread_mutex_init(&answers->lock, NULL);
    answers->ask = ask;
    answers->ask_contents = ask_contents;
    get_context = context;
    return answers;
}

void termite_answers_free(struct answers *answers)
{
    for (int slot = 0; slot < SLOTS; slot++)
        for (struct answer *answer = answers->slots[slot], *next; answer; answer = next) {
            next = answer->next;
            release(answer);
        }
    pthread_mutex_destroy(&answers->lock);
    free(answers);
}

/* From now on Python is asked; the size that was answered from here, or -1. */
int64_t termite_answers_drop(struct answers *answers, const char *path)
{
    int64_t told = -1;
    pthread_mutex_lock(&answers->lock);
    struct answer **at = find(answers, path), *old = *at;
    if (old) {
        told = old->told;
        *at = old->next;
        release(old);
    }
    pthread_mutex_unlock(&answers->lock);
    return told;
}

/* MODE 0: there is nothing.  CONTENTS: where they are, or NULL.  The size that was answered from here for what this
   replaces, or -1. */
int64_t termite_answers_put(struct answers *answers, const char *path, uint32_t mode, uint32_t links, uint32_t uid,
                            uint32_t gid, int64_t size, int64_t mtime_ns, const char *contents)
{
    struct timespec when = {mtime_ns / 1000000000, mtime_ns % 1000000000};
    int64_t told = -1;
    if (when.tv_nsec < 0) {
        when.tv_sec--;
        when.tv_nsec += 1000000000;
    }
    pthread_mutex_lock(&answers->lock);
    struct answer **at = find(answers, path), *answer = *at;
    if (answer)
        told = answer->told;
    else if ((answer = malloc(sizeof *answer + strlen(path) + 1))) {
        strcpy(answer->path, path);
        answer->next = NULL;
        answer->contents = NULL;
        *at = answer;
    }
    if (answer) { /* else Python is asked, as for everything else */
        answer->told = -1;
        free(answer->contents);
        answer->contents = contents ? strdup(contents) : NULL;
        answer->st = (struct stat){
            .st_mode = mode, .st_nlink = links, .st_uid = uid, .st_gid = gid, .st_size = size,
            .st_blocks = (size + BLOCK - 1) / BLOCK * (BLOCK / 512), .st_blksize = BLOCK,
            .st_atim = when, .st_mtim = when, .st_ctim = when};
    }
    pthread_mutex_unlock(&answers->lock);
    return told;
}

/* The size that was answered from here, or -1. */
int64_t termite_answers_told(struct answers *answers, const char *path)
{
    pthread_mutex_lock(&answers->lock);
    struct answer *answer = *find(answers, path);
    int64_t told = answer ? answer->told : -1;
    pthread_mutex_unlock(&answers->lock);
    return told;
}

/* libfuse's getattr operation; the answers are its private data. */
int termite_answers_getattr(const char *path, struct stat *st)
{
    struct answers *answers = get_context()->private_data;
    pthread_mutex_lock(&answers->lock);
    struct answer *answer = *find(answers, path);
    if (answer) {
        *st = answer->st;
        answer->told = answer->st.st_size;
    }
    pthread_mutex_unlock(&answers->lock);
    if (!answer)
        return answers->ask(path, st);
    return st->st_mode ? 0 : -ENOENT;
}

/* As much as is there, or -1 if it is not what it should be, or not there any more. */
static ssize_t read_file(const char *path, int64_t length, char *buffer, size_t size, off_t offset)
{
    struct stat st;
    ssize_t done = -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -1;
    if (fstat(fd, &st) == 0 && st.st_size == length)
        done = pread(fd, buffer, size, offset); /* all of it: the file is in memory and does not change */
    close(fd);
    return done;
}

/* libfuse's read operation. */
int termite_answers_read(const char *path, char *buffer, size_t size, off_t offset, void *info)
{
    struct answers *answers = get_context()->private_data;
    char contents[PATH_MAX] = "";
    int64_t length = 0;
    pthread_mutex_lock(&answers->lock);
    struct answer *answer = *find(answers, path);
    if (answer && answer->contents && answer->told == answer->st.st_size && strlen(answer->contents) < sizeof contents) {
        strcpy(contents, answer->contents);
        length = answer->told;
    }
    pthread_mutex_unlock(&answers->lock);
    ssize_t done = *contents ? read_file(contents, length, buffer, size, offset) : -1;
    if (done < 0)
        return answers->ask_contents(path, buffer, size, offset, info);
    __atomic_fetch_add(&answers->reads, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&answers->read_bytes, done, __ATOMIC_RELAXED);
    return done;
}

/* How much was read from here. */
void termite_answers_counts(const struct answers *answers, int64_t *reads, int64_t *bytes)
{
    *reads = __atomic_load_n(&answers->reads, __ATOMIC_RELAXED);
    *bytes = __atomic_load_n(&answers->read_bytes, __ATOMIC_RELAXED);
}
