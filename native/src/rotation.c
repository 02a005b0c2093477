/* Owns the reading of rotations (formats.md, rotation keys): fused ones need nothing, online ones become Hadamards. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "model.h"

enum { ROTATIONS_MAX = 4096 };

static int string_is(const char *text, uint64_t length, const char *expected) {
    return length == strlen(expected) && memcmp(text, expected, length) == 0;
}

static const char *rotation_key(int index, const char *suffix, char name[96]) {
    snprintf(name, 96, "rondel.rotation.%d.%s", index, suffix);
    return name;
}

enum site { HIDDEN, QUERIES, BOUNDARY, SITES };
static const char *const site_names[SITES] = {[HIDDEN] = "hidden", [QUERIES] = "queries", [BOUNDARY] = "boundary"};

static int site_size(const struct hyperparameters *numbers, enum site site) {
    return site == HIDDEN ? numbers->hidden : site == QUERIES ? numbers->head_dim : numbers->width;
}

static const rondel_hadamard *make(struct rondel_model *model, const struct gguf_key *signs, uint32_t size, uint32_t block,
                                   int transposed) {
    rondel_hadamard *made = hadamard_new(size, block, signs->data, transposed);
    if (made) model->rotations[model->rotation_count++] = made;
    return made;
}

static int attach_to_layers(struct rondel_model *model, int index, enum site site, const rondel_hadamard *rotation) {
    char name[96];
    int64_t *layers;
    uint64_t count;
    int found = gguf_get_integers(model->file, rotation_key(index, "layers", name), 0, model->numbers.layers - 1, &layers,
                                  &count);
    if (found < 0) return -1;
    uint64_t attached = found ? count : (uint64_t)model->numbers.layers;
    int twice = 0;
    for (uint64_t i = 0; i < attached; i++) {
        struct layer *layer = &model->layer[found ? (uint64_t)layers[i] : i];
        const rondel_hadamard **place = site == HIDDEN ? &layer->hidden_rotation : &layer->head_rotation;
        twice |= *place != NULL;
        *place = rotation;
    }
    free(layers);
    if (attached == 0) return set_error("%s: rotation %d has no layers", model->file->shards[0].path, index);
    return twice ? set_error("%s: two online rotations on one site of a layer", model->file->shards[0].path) : 0;
}

static int attach(struct rondel_model *model, int index, enum site site, const struct gguf_key *signs, uint32_t size,
                  uint32_t block) {
    char name[96];
    const rondel_hadamard *rotation = make(model, signs, size, block, 0);
    if (!rotation) return -1;
    if (site != BOUNDARY) return attach_to_layers(model, index, site, rotation);
    if (gguf_key_find(model->file, rotation_key(index, "layers", name)))
        return set_error("%s: the key %s must be absent: the boundary is no site of a layer", model->file->shards[0].path, name);
    if (model->boundary[0]) return set_error("%s: two online rotations on the boundary", model->file->shards[0].path);
    model->boundary[0] = rotation;
    model->boundary[1] = make(model, signs, size, block, 1);
    return model->boundary[1] ? 0 : -1;
}

static int read_online(struct rondel_model *model, int index) {
    const rondel_file *file = model->file;
    const char *path = file->shards[0].path, *site_name = "", *kind = "";
    char name[96];
    uint64_t site_length = 0, kind_length = 0;
    uint32_t size = 0, block = 0;
    int site = 0;
    if (gguf_get_string(file, rotation_key(index, "site", name), &site_name, &site_length) < 0 ||
        gguf_get_string(file, rotation_key(index, "kind", name), &kind, &kind_length) < 0 ||
        gguf_get_u32(file, rotation_key(index, "size", name), &size) < 0)
        return -1;
    block = size;
    if (gguf_get_u32(file, rotation_key(index, "block", name), &block) < 0) return -1;
    while (site < SITES && !string_is(site_name, site_length, site_names[site])) site++;
    if (site == SITES || !string_is(kind, kind_length, "hadamard"))
        return set_error("%s: the online rotation '%.*s' of the site '%.*s' is not supported (hadamard of hidden, queries and "
                         "boundary is)", path, (int)(kind_length < 40 ? kind_length : 40), kind,
                         (int)(site_length < 40 ? site_length : 40), site_name);
    int expected = site_size(&model->numbers, site);
    if (size != (uint32_t)expected)
        return set_error("%s: rotation %d has the size %u, the site %s has %d channels", path, index, size, site_names[site],
                         expected);
    const struct gguf_key *signs = gguf_key_find(file, rotation_key(index, "signs", name));
    if (!signs || signs->type != GGUF_ARRAY || signs->element != GGUF_U8 || signs->bytes != (size + 7) / 8)
        return set_error("%s: the key %s must be an array of %u u8", path, name, (size + 7) / 8);
    return attach(model, index, site, signs, size, block);
}

int rotations_read(struct rondel_model *model) {
    uint32_t count = 0;
    if (gguf_get_u32(model->file, "rondel.rotation.count", &count) < 0) return -1;
    if (count > ROTATIONS_MAX)
        return set_error("%s: %u rotations, at most %d are believed", model->file->shards[0].path, count, ROTATIONS_MAX);
    model->rotations = calloc(count + 1, sizeof *model->rotations); /* the boundary makes two */
    if (!model->rotations) return set_error("out of memory for %u rotations", count);
    for (uint32_t i = 0; i < count; i++) {
        char name[96];
        int online = 0;
        if (gguf_get_bool(model->file, rotation_key((int)i, "online", name), &online) < 0) return -1;
        if (online && read_online(model, (int)i)) return -1;
    }
    return 0;
}
