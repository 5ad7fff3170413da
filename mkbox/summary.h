/* The last line of a build, printed by its topmost program (make) at its own end.
 *
 * Only there is it in place: whoever waits for make prints a prompt, or goes on, as soon as make has ended.
 */
#ifndef TERMITE_SUMMARY_H
#define TERMITE_SUMMARY_H

#include <stdbool.h>

#define HIDDEN __attribute__((visibility("hidden"))) /* this ends up inside other people's programs */

/* Notes, at the program's start, whether it is the topmost one: TERMITE_BUILD is its process id. */
HIDDEN void remember_build(void);

/* At its end: asks the master what the build came to and prints that; nothing if it is not the topmost one. */
HIDDEN void print_summary(void);

#endif
