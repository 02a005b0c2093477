/* Owns the parameter sets of replication: their entries, the base64 payload, and base -> layer -> copy inheritance.
 *
 * Entry e of `ent.*`: kind, encoding, offset into the payload in 16-bit words, and length in elements. Dense: `len`
 * halves. Sparse: `len` pairs (u16 index, half); what is not listed keeps its identity. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "kernels/kernels.h"
#include "plan.h"

typedef unsigned long long ull;

enum encoding { DENSE_F16, SPARSE_F16 };
enum {
    GATE_ATTN = 1, GATE_FFN, ATTN_NORM_GAIN, FFN_NORM_GAIN, ATTN_OUT_GAIN, FFN_OUT_GAIN, ATTN_OUT_BIAS, FFN_OUT_BIAS,
    Q_HEAD_GAIN, HIDDEN_GAIN
};

/* All parameters of a file together; more than any sensible file, and it bounds what a hostile one can ask for. */
static const uint64_t values_max = 1ull << 28;

static uint64_t kind_size(const struct hyperparameters *numbers, int64_t kind) {
    switch (kind) {
        case GATE_ATTN: case GATE_FFN: return 1;
        case Q_HEAD_GAIN: return (uint64_t)numbers->heads;
        case HIDDEN_GAIN: return (uint64_t)numbers->hidden;
        default: return kind >= ATTN_NORM_GAIN && kind <= FFN_OUT_BIAS ? (uint64_t)numbers->width : 0;
    }
}

static const char *kind_name(int64_t kind) {
    if (kind == 16) return "activation scale";
    if (kind == 17) return "activation clip";
    if (kind == 18) return "activation bits";
    if (kind == 19) return "rounding";
    if (kind == 20) return "rotation seed";
    if (kind == 21) return "expert gain";
    return kind >= 32 && kind <= 47 ? "low rank" : "unknown";
}

static int base64_digit(unsigned char letter) {
    if (letter >= 'A' && letter <= 'Z') return letter - 'A';
    if (letter >= 'a' && letter <= 'z') return letter - 'a' + 26;
    if (letter >= '0' && letter <= '9') return letter - '0' + 52;
    return letter == '+' ? 62 : letter == '/' ? 63 : -1;
}

/* Decodes the payload into 16-bit words (free them); *words of them. */
static int decode_payload(const char *text, uint64_t length, uint16_t **out, uint64_t *words) {
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

/* One entry as (size) floats. */
static int decode_entry(int64_t kind, int64_t encoding, uint64_t offset, uint64_t length, const uint16_t *payload,
                        uint64_t words, uint64_t size, float *out) {
    if (encoding != DENSE_F16 && encoding != SPARSE_F16)
        return set_error("replication parameters in the encoding %lld cannot be executed", (long long)encoding);
    uint64_t each = encoding == SPARSE_F16 ? 2 : 1;
    if (offset > words || length > (words - offset) / each)
        return set_error("a replication parameter of kind %lld lies outside the payload", (long long)kind);
    if (encoding == DENSE_F16 ? length != size : length > size)
        return set_error("a replication parameter of kind %lld has %llu values, expected %llu", (long long)kind,
                         (ull)length, (ull)size);
    float identity = kind == ATTN_OUT_BIAS || kind == FFN_OUT_BIAS ? 0.0f : 1.0f;
    for (uint64_t i = 0; i < size; i++) out[i] = identity;
    for (uint64_t i = 0; i < length; i++) {
        const uint16_t *word = payload + offset + i * each;
        uint64_t index = encoding == SPARSE_F16 ? word[0] : i;
        float value = half_to_float(word[each - 1]);
        if (index >= size || !isfinite(value))
            return set_error("a replication parameter of kind %lld has a bad index or a value that is not finite",
                             (long long)kind);
        out[index] = value;
    }
    return 0;
}

/* The entry arrays as they stand in the file. */
struct entries {
    int64_t *kind, *encoding, *offset, *length, *first;
    uint64_t count, bounds; /* entries; elements of `first` */
};

static int read_entries(struct entries *entries, const rondel_file *file) {
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

static int fill_sets(struct parameter_sets *sets, const struct entries *entries, const struct hyperparameters *numbers,
                     const uint16_t *payload, uint64_t words) {
    uint64_t total = 0;
    for (uint64_t e = 0; e < entries->count; e++) {
        uint64_t size = kind_size(numbers, entries->kind[e]);
        if (size == 0)
            return set_error("replication parameters of kind %lld (%s) cannot be executed", (long long)entries->kind[e],
                             kind_name(entries->kind[e]));
        total += size;
        if (total > values_max) return set_error("the replication parameters are larger than %llu values", (ull)values_max);
    }
    sets->values = malloc((total + 1) * sizeof(float));
    if (!sets->values) return set_error("out of memory for the replication parameters");
    float *next = sets->values;
    for (uint64_t set = 1; set <= sets->count; set++)
        for (int64_t e = entries->first[set - 1]; e < entries->first[set]; e++) {
            int64_t kind = entries->kind[e];
            uint64_t size = kind_size(numbers, kind);
            if (decode_entry(kind, entries->encoding[e], (uint64_t)entries->offset[e], (uint64_t)entries->length[e], payload,
                             words, size, next))
                return -1;
            sets->set[set].value[kind] = next;
            next += size;
        }
    return 0;
}

int parameter_sets_read(struct parameter_sets *sets, const struct rondel_model *model) {
    memset(sets, 0, sizeof *sets);
    struct entries entries = {0};
    const char *text = "";
    uint64_t length = 0, words = 0;
    uint16_t *payload = NULL;
    int failed = read_entries(&entries, model->file) ||
                 gguf_get_string(model->file, "rondel.replication.payload", &text, &length) < 0 ||
                 decode_payload(text, length, &payload, &words);
    if (!failed) {
        sets->count = entries.bounds ? entries.bounds - 1 : 0;
        sets->set = calloc(sets->count + 1, sizeof *sets->set);
        failed = sets->set ? fill_sets(sets, &entries, &model->numbers, payload, words)
                           : set_error("out of memory for the replication parameters");
    }
    free(payload);
    free(entries.kind);
    free(entries.encoding);
    free(entries.offset);
    free(entries.length);
    free(entries.first);
    return failed ? -1 : 0;
}

int parameters_resolve(struct parameters *parameters, const struct parameter_set *copy, const struct parameter_set *layer,
                       int pass, int parts) {
    const float *value[KIND_MAX + 1];
    for (int kind = 0; kind <= KIND_MAX; kind++) value[kind] = copy->value[kind] ? copy->value[kind] : layer->value[kind];
    *parameters = (struct parameters){.q_head_gain = value[Q_HEAD_GAIN], .hidden_gain = value[HIDDEN_GAIN]};
    for (int part = 0; part < PARTS; part++) {
        const float *gate = value[GATE_ATTN + part];
        if (pass >= 1 && parts >> part & 1 && !gate)
            return set_error("a copy of a layer (pass %d) has no gate of its own", pass);
        parameters->gate[part] = gate ? *gate : 1.0f;
        parameters->norm_gain[part] = value[ATTN_NORM_GAIN + part];
        parameters->out_gain[part] = value[ATTN_OUT_GAIN + part];
        parameters->out_bias[part] = value[ATTN_OUT_BIAS + part];
    }
    return 0;
}
