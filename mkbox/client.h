/* The master as the programs around make see it: find its socket, ask one thing, obey the answer. */
#ifndef TERMITE_CLIENT_H
#define TERMITE_CLIENT_H

#include <stdbool.h>
#include <stddef.h>

#include "wrapper_protocol.h"

struct request {
    enum request_kind kind;
    unsigned flags;
    const char *program; /* path to execute; "": find argv[0] on PATH */
    const char *worker;  /* preferred worker, or "" */
    char **argv;
    char **env;
};

struct answer {
    enum { ANSWER_EXIT, ANSWER_LOCAL, ANSWER_LOST, ANSWER_LATE, ANSWER_GARBAGE } what;
    int value; /* wait status of ANSWER_EXIT; flags of ANSWER_LOCAL */
};

/* The working directory, allocated; fails if it is gone. */
char *working_directory(void);

/* Absolute path of the master's socket: TERMITE_SOCKET, or the nearest one above the working
 * directory; NULL when there is none. */
char *find_socket(void);

/* A connection, or -1 and errno: ECONNREFUSED or ENOENT when nobody listens, EPERM when the socket was
 * found by walking up and belongs to somebody else. */
int connect_to(const char *path);

/* One line that says what connect_to()'s errno means for the user. */
const char *why_unreachable(int error);

/* Sends the request; false when the master went away. */
bool ask(int fd, const struct request *request);

/* Passes output and stdin along until the master has said how it ends.
 * seconds > 0 bounds each wait for the master; 0 waits as long as the command runs. */
struct answer obey(int fd, int seconds);

/* Ends this process as WAIT_STATUS says the command ended, by the same signal if it was one. */
_Noreturn void end_like(int wait_status);

#endif
