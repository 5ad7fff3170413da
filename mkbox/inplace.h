/* Running a command in place of this process, and the few helpers that the programs around make share. */
#ifndef TERMITE_INPLACE_H
#define TERMITE_INPLACE_H

#include <stddef.h>

/* Writes "termite: TEXT\n" to stderr in one piece. */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The same, then exit(status). */
_Noreturn void fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

void *allocate(size_t bytes);

/* DIRECTORY/NAME, allocated; LENGTH bytes of DIRECTORY count. */
char *joined(const char *directory, size_t length, const char *name);

/* LIST, an LD_PRELOAD value, without the interposer; the result is allocated. */
char *without_interposer(const char *list);

/* Where LIST names the interposer, its length into LENGTH; NULL when it does not. */
const char *interposer_in(const char *list, size_t *length);

/* Executes as execvpe(3) does, with PATH from ENV; returns errno. */
int execute(const char *program, char **argv, char **env);

/* NAME=value looked up in ENV; NULL when not set or empty. */
const char *setting(char **env, const char *name);

#endif
