/* The parameters of replication as they lie in a file.
 *
 * Entry e of `ent.*`: kind, encoding, offset into the payload in 16-bit words, and length in elements. Dense: `len`
 * halves; of a low-rank term, row after row, so the length tells the rank. Sparse: `len` pairs (u16 index, half); what is
 * not listed keeps its identity. Integer: one int16. */
#ifndef RONDEL_PLAN_PAYLOAD_H
#define RONDEL_PLAN_PAYLOAD_H
#include <stdint.h>

#include "gguf.h"

enum replication_encoding { DENSE_F16, SPARSE_F16, INTEGER_I16 };

struct replication_entries {
    int64_t *kind, *encoding, *offset, *length; /* (count) */
    int64_t *first;                             /* (bounds): set s has the entries first[s - 1] .. first[s] - 1 */
    uint64_t count, bounds;
};

/* -1 with set_error; free the entries in either case. */
int replication_entries(struct replication_entries *entries, const rondel_file *file);
void replication_entries_free(struct replication_entries *entries);
int replication_payload(const rondel_file *file, uint16_t **payload, uint64_t *words); /* free the payload */

#endif
