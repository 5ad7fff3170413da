/* The bytes on `.termite-socket`, between the programs around make and the master.
 *
 * Little-endian.  One request per connection, sent at once after connect:
 *
 *   "TMW1" | u32 length of the rest | u8 kind | u8 flags | u16 0 | u32 umask | u32 argc | u32 envc
 *          | NUL-terminated strings: cwd, program, worker, argv[argc], env[envc]
 *
 * Then frames of u8 kind | u32 length | payload in both directions, until FRAME_EXIT or FRAME_LOCAL.
 * The same page for the master's side is termite/master/local.py.
 */
#ifndef TERMITE_WRAPPER_PROTOCOL_H
#define TERMITE_WRAPPER_PROTOCOL_H

#define WRAPPER_MAGIC "TMW1"
#define SOCKET_NAME ".termite-socket"
#define INTERPOSER_NAME "libtermite-interpose.so"

enum request_kind {
    REQUEST_RUN = 1,      /* run argv, here or there, as the master decides */
    REQUEST_REFRESH = 2,  /* look at the project's files again */
    REQUEST_SHUTDOWN = 3, /* end the master */
    REQUEST_INSPECT = 4,  /* say what is known about the files in argv */
    REQUEST_LOCAL = 5,    /* argv is about to run in place of this process; refresh when it has ended */
    REQUEST_SUMMARY = 6,  /* what has the build TERMITE_BUILD come to? */
};

enum request_flag {
    FLAG_DEBUG = 1,
    FLAG_MERGED = 2, /* stdout and stderr are the same open file */
    FLAG_STDIN = 4,  /* stdin has or may get data */
};

enum frame_kind {
    /* from the master */
    FRAME_STDOUT = 'O',
    FRAME_STDERR = 'E',
    FRAME_MESSAGE = 'M', /* one line for the user, without newline */
    FRAME_EXIT = 'X',    /* i32 wait status; the last frame */
    FRAME_LOCAL = 'L',   /* u8 flags: execute the command in place; the last frame, before any output */
    FRAME_WANT = 'W',    /* the command reads its stdin: send one FRAME_STDIN */
    /* to the master */
    FRAME_STDIN = 'S', /* length 0: end of file */
};

#define LOCAL_RECURSE 1 /* flag of FRAME_LOCAL: what runs below may be distributed again */

#define FRAME_HEADER 5
#define STDIN_PIECE 65536

#endif
