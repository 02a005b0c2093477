/* Owns what lies in a file of replication parameters: the arrays of entries and the base64 payload. */
#include "plan_payload.h"

#include <stdlib.h>

#include "error.h"

typedef unsigned long long ull;

static int base64_digit(unsigned char letter) {
    if (letter >= 'A' && letter <= 'Z') return letter - 'A';
    if (letter >= 'a' && letter <= 'z') return letter - 'a' + 26;
    if (letter >= '0' && letter <= '9') return letter - '0' + 52;
    return letter == '+' ? 62 : letter == '/' ? 63 : -1;
}

/* Text to 16-bit words (free them); *words of them. */
static int decode_base64(const char *text, uint64_t length, uint16_t **out, uint64_t *words) {
    while (length > 0 && text[length - 1] == '=') length--;
    uint64_t bytes = length / 4 * 3 + (length % 4 ? length % 4 - 1 : 0), filled = 0;
    uint8_t *data = malloc(bytes + 3);
    if (!data) return set_error("out of memory for the replication payload");
    uint32_t bits = 0;
    int held = 0;
    for (uint64_t i = 0; i < length; i++) {
        int digit = base64_digit((unsigned char)text[i]);
        if (digit < 0) {
            free(data);
            return set_error("replication.payload is no base64 (letter %llu)", (ull)i);
        }
        bits = bits << 6 | (uint32_t)digit;
        held += 6;
        if (held >= 8) data[filled++] = (uint8_t)(bits >> (held -= 8));
    }
    uint16_t *halves = malloc(filled + 2);
    if (halves)
        for (uint64_t i = 0; i < filled / 2; i++) halves[i] = (uint16_t)(data[2 * i] | data[2 * i + 1] << 8);
    free(data);
    *out = halves;
    *words = filled / 2;
    return halves ? 0 : set_error("out of memory for the replication payload");
}

int replication_payload(const rondel_file *file, uint16_t **out, uint64_t *words) {
    const char *text = "";
    uint64_t length = 0;
    if (gguf_get_string(file, "rondel.replication.payload", &text, &length) < 0) return -1;
    return decode_base64(text, length, out, words);
}

int replication_entries(struct replication_entries *entries, const rondel_file *file) {
    struct {
        const char *name;
        int64_t **values;
        uint64_t count;
    } arrays[] = {{"rondel.replication.ent.kind", &entries->kind, 0},
                  {"rondel.replication.ent.enc", &entries->encoding, 0},
                  {"rondel.replication.ent.off", &entries->offset, 0},
                  {"rondel.replication.ent.len", &entries->length, 0}};
    for (int i = 0; i < 4; i++) {
        if (gguf_get_integers(file, arrays[i].name, 0, UINT32_MAX, arrays[i].values, &arrays[i].count) < 0) return -1;
        if (arrays[i].count != arrays[0].count)
            return set_error("%s has %llu elements, replication.ent.kind has %llu", arrays[i].name, (ull)arrays[i].count,
                             (ull)arrays[0].count);
    }
    entries->count = arrays[0].count;
    if (gguf_get_integers(file, "rondel.replication.pset.first", 0, (int64_t)entries->count, &entries->first,
                          &entries->bounds) < 0)
        return -1;
    int ordered = entries->bounds == 0 ? entries->count == 0
                                       : entries->first[0] == 0 && entries->first[entries->bounds - 1] == (int64_t)entries->count;
    for (uint64_t i = 1; i < entries->bounds; i++) ordered &= entries->first[i] >= entries->first[i - 1];
    return ordered ? 0 : set_error("replication.pset.first does not divide the %llu entries", (ull)entries->count);
}

void replication_entries_free(struct replication_entries *entries) {
    free(entries->kind);
    free(entries->encoding);
    free(entries->offset);
    free(entries->length);
    free(entries->first);
}
