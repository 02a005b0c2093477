/* The one place where a failure becomes a sentence: set_error(...) and return its value. */
#ifndef RONDEL_ERROR_H
#define RONDEL_ERROR_H

#define EXPORT __attribute__((visibility("default")))

/* Formats the sentence for rondel_last_error() of this thread; returns -1 so that `return set_error(...)` reads well. */
int set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
