/* Owns the order of execution: layers and replication keys become an array of steps, validated once. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

typedef unsigned long long ull;

enum { REPLICATION_MAJOR = 1, STEPS_MAX = 65536 };
enum { BLOCK = 1 << ATTENTION | 1 << FFN };

void plan_free(struct plan *plan) {
    if (!plan) return;
    free(plan->steps);
    free(plan->values);
    free(plan);
}

static struct plan *plan_new(int count) {
    struct plan *plan = calloc(1, sizeof *plan);
    if (plan && (plan->steps = calloc((size_t)count, sizeof *plan->steps))) {
        plan->count = count;
        return plan;
    }
    free(plan);
    set_error("out of memory for a plan of %d steps", count);
    return NULL;
}

/* Every layer once, with a KV slot of its own. */
static struct plan *base_plan(const struct rondel_model *model) {
    struct plan *plan = plan_new(model->numbers.layers);
    for (int i = 0; plan && i < plan->count; i++)
        plan->steps[i] = (struct step){.layer = &model->layer[i], .parameters = {.gate = {1.0f, 1.0f}}, .parts = BLOCK,
                                       .slot = i, .writes_kv = 1, .members = 1, .leads = 1,
                                       .leads_slot = 1};
    if (plan) plan->slots = plan->count, plan->widest = 1;
    return plan;
}

/* The step table as it stands in the file. */
struct table {
    uint64_t steps, groups, layer_sets;
    int64_t *layer, *pass, *parts, *group, *kv, *set; /* (steps) */
    int64_t *merge;                                   /* (groups) */
    int64_t *layer_set;                               /* (layers) or NULL */
    const struct layer **slot_layer;                  /* (steps): whose keys lie in each KV slot that has been written */
    int64_t *layer_group, *slot_group;                /* (layers), (steps): the last group with it, from 1; 0: none */
};

static void table_free(struct table *table) {
    free(table->layer);
    free(table->pass);
    free(table->parts);
    free(table->group);
    free(table->kv);
    free(table->set);
    free(table->merge);
    free(table->layer_set);
    free(table->slot_layer);
    free(table->layer_group);
    free(table->slot_group);
}

static int table_read(struct table *table, const struct rondel_model *model, uint64_t sets) {
    const rondel_file *file = model->file;
    int64_t layers = model->numbers.layers;
    struct {
        const char *name;
        int64_t low, high, **values;
    } columns[] = {{"rondel.replication.step.layer", 0, layers - 1, &table->layer},
                   {"rondel.replication.step.pass", 0, 255, &table->pass},
                   {"rondel.replication.step.parts", 1, BLOCK, &table->parts},
                   {"rondel.replication.step.group", 0, STEPS_MAX, &table->group},
                   {"rondel.replication.step.kv", -1, STEPS_MAX, &table->kv},
                   {"rondel.replication.step.pset", 0, (int64_t)sets, &table->set}};
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
        uint64_t count;
        if (gguf_get_integers(file, columns[i].name, columns[i].low, columns[i].high, columns[i].values, &count) < 0)
            return -1;
        if (i == 0) table->steps = count;
        if (count != table->steps || count < (uint64_t)layers || count > STEPS_MAX)
            return set_error("%s has %llu elements, expected one for each of the %llu steps (at least %lld, at most %d)",
                             columns[i].name, (ull)count, (ull)table->steps, (long long)layers, STEPS_MAX);
    }
    if (gguf_get_integers(file, "rondel.replication.group.merge", MERGE_NONE, MERGE_WEIGHTED_SUM, &table->merge,
                          &table->groups) < 0 ||
        gguf_get_integers(file, "rondel.replication.layer.pset", 0, (int64_t)sets, &table->layer_set,
                          &table->layer_sets) < 0)
        return -1;
    if (table->layer_set && table->layer_sets != (uint64_t)layers)
        return set_error("replication.layer.pset has %llu elements, expected %lld", (ull)table->layer_sets, (long long)layers);
    table->slot_layer = calloc(table->steps, sizeof *table->slot_layer);
    table->layer_group = calloc((size_t)layers, sizeof *table->layer_group);
    table->slot_group = calloc(table->steps, sizeof *table->slot_group);
    if (table->slot_layer && table->layer_group && table->slot_group) return 0;
    return set_error("out of memory for a plan of %llu steps", (ull)table->steps);
}

/* Pass 0 must be the model itself, so that a reader that ignores everything else runs it. */
static int check_base_path(const struct table *table, int layers) {
    int64_t next = 0;
    for (uint64_t i = 0; i < table->steps; i++) {
        if (table->pass[i] != 0) continue;
        if (table->layer[i] != next || table->parts[i] != BLOCK)
            return set_error("step %llu of the replication plan breaks its base path: pass 0 must be the whole layers 0 to "
                             "%d in order", (ull)i, layers - 1);
        next++;
    }
    return next == layers ? 0 : set_error("pass 0 of the replication plan has %lld layers, expected %d", (long long)next, layers);
}

/* Whether this is the first question about `index` in this group. */
static int first_with(int64_t *last, int64_t index, int64_t group) {
    int first = last[index] != group + 1;
    last[index] = group + 1;
    return first;
}

/* Groups are runs of equal numbers 0, 1, 2...: fills member, members, leads and merge, and the widest. */
static int place_groups(struct plan *plan, const struct table *table) {
    for (uint64_t i = 0; i < table->steps; i++) {
        int64_t expected = i == 0 ? 0 : table->group[i - 1];
        if (table->group[i] != expected && !(i > 0 && table->group[i] == expected + 1))
            return set_error("the groups of the replication plan are not contiguous at step %llu", (ull)i);
    }
    for (uint64_t first = 0, last; first < table->steps; first = last) {
        for (last = first; last < table->steps && table->group[last] == table->group[first];) last++;
        int64_t group = table->group[first];
        int merge = (uint64_t)group < table->groups ? (int)table->merge[group] : MERGE_NONE;
        if (last - first > 1 && merge == MERGE_NONE)
            return set_error("group %lld of the replication plan has %llu members and no merge", (long long)group,
                             (ull)(last - first));
        for (uint64_t i = first; i < last; i++) {
            plan->steps[i].member = (int)(i - first);
            plan->steps[i].members = (int)(last - first);
            plan->steps[i].leads = first_with(table->layer_group, table->layer[i], group);
            plan->steps[i].merge = (enum merge)merge;
        }
        if (last - first > (uint64_t)plan->widest) plan->widest = (int)(last - first);
    }
    return 0;
}

/* A slot number one past the largest so far is a new cache; an earlier one of the layer is shared: read, not written. */
static int place_slot(struct plan *plan, struct step *step, const struct table *table, uint64_t index) {
    int attention = step->parts >> ATTENTION & 1;
    int64_t kv = table->kv[index];
    step->slot = (int)kv;
    if (attention ? kv < 0 || kv > plan->slots : kv != -1)
        return set_error("step %llu of the replication plan has the KV slot %lld, expected %s%d", (ull)index, (long long)kv,
                         attention ? "0 to " : "", attention ? plan->slots : -1);
    step->writes_kv = attention && kv == plan->slots;
    if (table->pass[index] == 0 && !step->writes_kv)
        return set_error("step %llu of the replication plan is of pass 0 and shares a KV slot", (ull)index);
    if (step->writes_kv) table->slot_layer[plan->slots++] = step->layer;
    if (attention && table->slot_layer[kv] != step->layer)
        return set_error("step %llu of the replication plan has the KV slot %lld of another layer", (ull)index, (long long)kv);
    step->leads_slot = attention && first_with(table->slot_group, kv, table->group[index]);
    return 0;
}

static int fill_plan(struct plan *plan, const struct table *table, const struct rondel_model *model,
                     const struct parameter_sets *sets) {
    if (check_base_path(table, model->numbers.layers) || place_groups(plan, table)) return -1;
    for (uint64_t i = 0; i < table->steps; i++) {
        struct step *step = &plan->steps[i];
        int64_t layer = table->layer[i], pass = table->pass[i];
        step->layer = &model->layer[layer];
        step->parts = (int)table->parts[i];
        if (place_slot(plan, step, table, i)) return -1;
        const struct parameter_set *inherited = &sets->set[table->layer_set && pass > 0 ? table->layer_set[layer] : 0];
        if (parameters_resolve(&step->parameters, &sets->set[table->set[i]], inherited, (int)pass, step->parts)) return -1;
        for (int role = 0; role < ROLES; role++)
            if (step->parameters.low_rank[role].rank > plan->rank) plan->rank = step->parameters.low_rank[role].rank;
    }
    return 0;
}

static struct plan *replication_plan(const struct rondel_model *model) {
    struct parameter_sets sets;
    struct table table = {0};
    struct plan *plan = NULL;
    uint32_t layers = (uint32_t)model->numbers.layers;
    int failed = gguf_get_u32(model->file, "rondel.replication.n_base", &layers) < 0;
    if (!failed && layers != (uint32_t)model->numbers.layers)
        failed = set_error("replication.n_base is %u, the model has %d layers", layers, model->numbers.layers);
    failed = parameter_sets_read(&sets, model) || failed;
    failed = failed || table_read(&table, model, sets.count) || !(plan = plan_new((int)table.steps)) ||
             fill_plan(plan, &table, model, &sets);
    table_free(&table);
    free(sets.set);
    if (plan) plan->values = sets.values;
    else free(sets.values);
    if (!failed) return plan;
    plan_free(plan);
    return NULL;
}

/* 1 = there is a plan to read, 0 = none (or one from the future, with a warning), -1 = the file refuses to run. */
static int wants_replication(struct rondel_model *model) {
    int64_t *version;
    uint64_t parts;
    int strict = 0, regression = 0;
    int found = gguf_get_integers(model->file, "rondel.replication.version", 0, UINT32_MAX, &version, &parts);
    if (found <= 0) return found;
    int64_t major = parts > 0 ? version[0] : 0;
    free(version);
    if (gguf_get_bool(model->file, "rondel.replication.strict", &strict) < 0) return -1;
    if (gguf_get_bool(model->file, "rondel.replication.eval.regression", &regression) < 0) return -1;
    if (regression)
        model_warn(model, "the copies in this file made the model worse when it was made: run it without replication");
    if (major == REPLICATION_MAJOR) return 1;
    if (strict)
        return set_error("%s: its replication has the version %lld, this runtime knows %d, and the file says that its base "
                         "path is not acceptable: use a newer rondel", model->file->shards[0].path, (long long)major,
                         REPLICATION_MAJOR);
    model_warn(model, "replication of version %lld is ignored (this runtime knows %d): the base path runs", (long long)major,
               REPLICATION_MAJOR);
    return 0;
}

int plans_build(struct rondel_model *model) {
    model->base = base_plan(model);
    if (!model->base) return -1;
    int wanted = wants_replication(model);
    if (wanted < 0) return -1;
    model->plan = wanted ? replication_plan(model) : base_plan(model);
    /* The base path needs none of it, so a bad plan refuses only when somebody wants to run it. */
    if (!model->plan) model->plan_error = strdup(rondel_last_error());
    return 0;
}
