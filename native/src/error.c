/* Owns the last error of each thread, and the interface version. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include "rondel.h"

static _Thread_local char message[1024];

int set_error(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return -1;
}

EXPORT const char *rondel_last_error(void) { return message; }

EXPORT uint32_t rondel_abi_version(void) { return 4; }
