/* Owns the parameter sets of replication: the kinds, their values, and base -> layer -> copy inheritance. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "kernels/kernels.h"
#include "plan.h"
#include "plan_payload.h"

typedef unsigned long long ull;

enum {
    GATE_ATTN = 1, GATE_FFN, ATTN_NORM_GAIN, FFN_NORM_GAIN, ATTN_OUT_GAIN, FFN_OUT_GAIN, ATTN_OUT_BIAS, FFN_OUT_BIAS,
    Q_HEAD_GAIN, HIDDEN_GAIN,
    ACT_SCALE = 16, ACT_CLIP, ACT_BITS, ROUNDING, ROTATION_SEED,
    LEFT = 32, RIGHT /* of role 0; the other roles follow in pairs */
};

/* All parameters of a file together; more than any sensible file, and it bounds what a hostile one can ask for. */
static const uint64_t values_max = 1ull << 28;
enum { SETS_MAX = 1 << 17 };

static int is_low_rank(int64_t kind) { return kind >= LEFT && kind <= KIND_MAX; }
static int is_whole(int64_t kind) { return kind == ACT_BITS || kind == ROUNDING || kind == ROTATION_SEED; }

/* Values of a kind, of each rank for a low-rank term; 0: not executed. */
static uint64_t kind_size(const struct rondel_model *model, int64_t kind) {
    if (is_low_rank(kind)) {
        const struct matrix *weights = &model->layer[0].linear[(kind - LEFT) / 2].weights;
        return (uint64_t)((kind - LEFT) % 2 ? weights->cols : weights->rows);
    }
    if (kind >= ATTN_NORM_GAIN && kind <= FFN_OUT_BIAS) return (uint64_t)model->numbers.width;
    if (kind == Q_HEAD_GAIN) return (uint64_t)model->numbers.heads;
    if (kind == HIDDEN_GAIN) return (uint64_t)model->numbers.hidden;
    return kind == GATE_ATTN || kind == GATE_FFN || (kind >= ACT_SCALE && kind <= ROTATION_SEED);
}

/* The number of values that an entry becomes; 0 with set_error. */
static uint64_t entry_size(const struct rondel_model *model, int64_t kind, int64_t encoding, uint64_t length) {
    uint64_t size = kind_size(model, kind), other = is_low_rank(kind) ? kind_size(model, kind ^ 1) : 1;
    if (size == 0) {
        set_error("replication parameters of kind %lld (%s) cannot be executed", (long long)kind,
                  kind == 21 ? "expert gain" : "unknown");
        return 0;
    }
    int known = is_whole(kind) ? encoding == INTEGER_I16
                               : encoding == DENSE_F16 || (encoding == SPARSE_F16 && !is_low_rank(kind));
    if (!known) {
        set_error("replication parameters of kind %lld in the encoding %lld cannot be executed", (long long)kind,
                  (long long)encoding);
        return 0;
    }
    if (is_low_rank(kind)) {
        if (length > 0 && length % size == 0 && length / size <= (size < other ? size : other)) return length;
        set_error("a replication parameter of kind %lld has %llu values, expected a multiple of %llu, at most %llu times",
                  (long long)kind, (ull)length, (ull)size, (ull)(size < other ? size : other));
        return 0;
    }
    if (encoding == SPARSE_F16 ? length <= size : length == size) return size;
    set_error("a replication parameter of kind %lld has %llu values, expected %llu", (long long)kind, (ull)length, (ull)size);
    return 0;
}

static int check_value(int64_t kind, float value) {
    int bad = !isfinite(value) || ((kind == ACT_SCALE || kind == ACT_CLIP) && !(value > 0)) ||
              (kind == ACT_BITS && (value < 2 || value > 16)) || (is_whole(kind) && value < 0);
    return bad ? set_error("a replication parameter of kind %lld has the value %g, which cannot be executed",
                           (long long)kind, (double)value) : 0;
}

/* One entry as (size) floats. */
static int decode_entry(int64_t kind, int64_t encoding, uint64_t offset, uint64_t length, const uint16_t *payload,
                        uint64_t words, uint64_t size, float *out) {
    uint64_t each = encoding == SPARSE_F16 ? 2 : 1;
    if (offset > words || length > (words - offset) / each)
        return set_error("a replication parameter of kind %lld lies outside the payload", (long long)kind);
    float identity = kind == ATTN_OUT_BIAS || kind == FFN_OUT_BIAS ? 0.0f : 1.0f;
    for (uint64_t i = 0; i < size; i++) out[i] = identity;
    for (uint64_t i = 0; i < length; i++) {
        const uint16_t *word = payload + offset + i * each;
        uint64_t index = encoding == SPARSE_F16 ? word[0] : i;
        float value = encoding == INTEGER_I16 ? (float)(int16_t)*word : half_to_float(word[each - 1]);
        if (index >= size)
            return set_error("a replication parameter of kind %lld has the bad index %llu", (long long)kind, (ull)index);
        if (check_value(kind, value)) return -1;
        out[index] = value;
    }
    return 0;
}

static int fill_sets(struct parameter_sets *sets, const struct replication_entries *entries, const struct rondel_model *model,
                     const uint16_t *payload, uint64_t words) {
    uint64_t total = 0;
    for (uint64_t e = 0; e < entries->count; e++) {
        uint64_t size = entry_size(model, entries->kind[e], entries->encoding[e], (uint64_t)entries->length[e]);
        if (size == 0) return -1;
        total += size;
        if (total > values_max) return set_error("the replication parameters are larger than %llu values", (ull)values_max);
    }
    sets->values = malloc((total + 1) * sizeof(float));
    if (!sets->values) return set_error("out of memory for the replication parameters");
    float *next = sets->values;
    for (uint64_t set = 1; set <= sets->count; set++)
        for (int64_t e = entries->first[set - 1]; e < entries->first[set]; e++) {
            int64_t kind = entries->kind[e], encoding = entries->encoding[e];
            uint64_t length = (uint64_t)entries->length[e], size = entry_size(model, kind, encoding, length);
            if (decode_entry(kind, encoding, (uint64_t)entries->offset[e], length, payload, words, size, next)) return -1;
            sets->set[set].value[kind] = next;
            if (is_low_rank(kind)) sets->set[set].rank[kind] = (int)(size / kind_size(model, kind));
            next += size;
        }
    return 0;
}

int parameter_sets_read(struct parameter_sets *sets, const struct rondel_model *model) {
    memset(sets, 0, sizeof *sets);
    struct replication_entries entries = {0};
    uint64_t words = 0;
    uint16_t *payload = NULL;
    int failed = replication_entries(&entries, model->file) || replication_payload(model->file, &payload, &words);
    sets->count = entries.bounds ? entries.bounds - 1 : 0;
    if (!failed && sets->count > SETS_MAX)
        failed = set_error("%llu sets of replication parameters, at most %d are believed", (ull)sets->count, SETS_MAX);
    if (!failed) {
        sets->set = calloc(sets->count + 1, sizeof *sets->set);
        failed = sets->set ? fill_sets(sets, &entries, model, payload, words)
                           : set_error("out of memory for the replication parameters");
    }
    free(payload);
    replication_entries_free(&entries);
    return failed ? -1 : 0;
}

/* ---- inheritance ---- */

static const struct parameter_set *holder(const struct parameter_set *copy, const struct parameter_set *layer, int kind) {
    return copy->value[kind] ? copy : layer;
}

static struct activation_rounding rounding_of(const float *const value[KIND_MAX + 1]) {
    int any = 0;
    for (int kind = ACT_SCALE; kind <= ROTATION_SEED; kind++) any |= value[kind] != NULL;
    if (!any) return (struct activation_rounding){0};
    return (struct activation_rounding){
        .bits = value[ACT_BITS] ? (int)*value[ACT_BITS] : 8,
        .scale = (value[ACT_SCALE] ? *value[ACT_SCALE] : 1.0f) * (value[ACT_CLIP] ? *value[ACT_CLIP] : 1.0f),
        .seed = value[ROUNDING] ? (int)*value[ROUNDING] : 0,
        .rotation = value[ROTATION_SEED] ? (int)*value[ROTATION_SEED] : 0,
    };
}

static int resolve_low_rank(struct low_rank terms[ROLES], const struct parameter_set *copy,
                            const struct parameter_set *layer) {
    for (int role = 0; role < ROLES; role++) {
        int left = LEFT + 2 * role, right = RIGHT + 2 * role;
        const struct parameter_set *of_left = holder(copy, layer, left), *of_right = holder(copy, layer, right);
        terms[role] = (struct low_rank){of_left->value[left], of_right->value[right], of_left->rank[left]};
        if (of_left->rank[left] != of_right->rank[right])
            return set_error("the halves of a low-rank term (kinds %d and %d) have the ranks %d and %d", left, right,
                             of_left->rank[left], of_right->rank[right]);
    }
    return 0;
}

int parameters_resolve(struct parameters *parameters, const struct parameter_set *copy, const struct parameter_set *layer,
                       int pass, int parts) {
    const float *value[KIND_MAX + 1];
    for (int kind = 0; kind <= KIND_MAX; kind++) value[kind] = holder(copy, layer, kind)->value[kind];
    *parameters = (struct parameters){.q_head_gain = value[Q_HEAD_GAIN], .hidden_gain = value[HIDDEN_GAIN],
                                      .rounding = rounding_of(value)};
    for (int part = 0; part < PARTS; part++) {
        const float *gate = value[GATE_ATTN + part];
        if (pass >= 1 && parts >> part & 1 && !gate)
            return set_error("a copy of a layer (pass %d) has no gate of its own", pass);
        parameters->gate[part] = gate ? *gate : 1.0f;
        parameters->norm_gain[part] = value[ATTN_NORM_GAIN + part];
        parameters->out_gain[part] = value[ATTN_OUT_GAIN + part];
        parameters->out_bias[part] = value[ATTN_OUT_BIAS + part];
    }
    return resolve_low_rank(parameters->low_rank, copy, layer);
}
