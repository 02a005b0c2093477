/* rondel: the native runtime's whole boundary.
 *
 * Opaque handles, plain C types, no struct that could change. A function that can fail returns NULL or a
 * negative number and leaves one sentence in rondel_last_error() (thread-local). Shapes are written
 * (rows, cols), row-major, rows = output channels. This header is also read by cffi: no preprocessor
 * directives outside the guard, no macros. */
#ifndef RONDEL_H
#define RONDEL_H
#include <stdint.h>

uint32_t rondel_abi_version(void);      /* bumped whenever a signature below changes */
const char *rondel_last_error(void);

/* ---- instruction sets: best first; the scalar one is the specification ---- */
int32_t rondel_isa_count(void);
const char *rondel_isa_name(int32_t index);
int32_t rondel_isa_usable(int32_t index);
const char *rondel_isa_current(void);
int32_t rondel_isa_use(const char *name); /* for tests and benchmarks; not while a session evaluates */

/* ---- formats: "F32", "Q4_K", "U4-128", ... ---- */
int32_t rondel_format_count(void);
const char *rondel_format_name(int32_t index);
int32_t rondel_format_ggml_type(const char *format);                /* -1: ours, stored as I8 bytes */
int64_t rondel_format_block(const char *format);                    /* columns a row must be a multiple of */
int64_t rondel_format_bytes(const char *format, int64_t rows, int64_t cols); /* -1: does not fit */
int32_t rondel_format_encodes(const char *format);                  /* 0: decoded and run, not written */
int32_t rondel_decode(const char *format, const void *packed, int64_t rows, int64_t cols, float *weights);
/* importance: (cols,) non-negative weights of the squared error, or NULL. Same bytes for any `threads`. */
int32_t rondel_encode(const char *format, const float *weights, const float *importance, int64_t rows, int64_t cols,
                      int32_t threads, void *packed);
int32_t rondel_format_feeds_back(const char *format);               /* 0: rondel_encode_feedback does not write it */
/* One block of columns, (rows, block), with error feedback from column to column inside it. importance: (block,) or NULL,
 * of the search for scales. upper: (block, block), U on and above the diagonal, inverse second moment = U^T U. errors:
 * (rows, block), (weight - decoded) / U_jj of every column when it was rounded; columns behind the block take their weights
 * less errors times U. */
int32_t rondel_encode_feedback(const char *format, const float *weights, const float *importance, const float *upper,
                               int64_t rows, int64_t block, void *packed, float *errors);
/* One sweep of coordinate descent on the output error tr((W - Q) H (W - Q)^T) over the codes of a rounded block of columns,
 * and a new fit of its d and dmin. gradient: (rows, block), the block's columns of (W - Q) H; moments: (block, block) of H. */
int32_t rondel_polish(const char *format, const float *gradient, const float *moments, int64_t rows, int64_t block,
                      void *packed);
/* outputs (n, rows) = inputs (n, cols) times packed (rows, cols) transposed, as the runtime computes it */
int32_t rondel_matmul(const char *format, const void *packed, int64_t rows, int64_t cols, const float *inputs,
                      int64_t n, int32_t threads, float *outputs);

/* ---- the Hadamard transform of online rotations: x <- H (s o x) / sqrt(block) on each block, or its transpose ---- */
typedef struct rondel_hadamard rondel_hadamard;
rondel_hadamard *rondel_hadamard_new(int64_t size, int64_t block, const uint8_t *signs, int32_t transposed); /* bits, LSB first */
void rondel_hadamard_free(rondel_hadamard *hadamard);
int32_t rondel_hadamard_rows(const rondel_hadamard *hadamard, float *x, int64_t n); /* in place on (n, size) */

/* ---- activations as copies with such parameters round them: rows of one layer (input 0 attention, 1 heads, 2 FFN, 3 hidden)
 * at the positions `position`, position + 1, ... to `bits` and back, in place on (n, channels); seeds of 0 mean none ---- */
int32_t rondel_round_activations(float *x, int64_t n, int64_t channels, int32_t bits, float scale, int32_t seed,
                                 int32_t rotation, int32_t layer, int32_t input, int32_t position);

/* ---- a GGUF file: parsed, checked and mapped (all shards of a split) ---- */
typedef struct rondel_file rondel_file;
rondel_file *rondel_file_open(const char *path);
void rondel_file_close(rondel_file *file);
uint32_t rondel_file_version(const rondel_file *file);
uint64_t rondel_file_alignment(const rondel_file *file);
int32_t rondel_file_shard_count(const rondel_file *file);
const char *rondel_file_shard_path(const rondel_file *file, int32_t shard);
int64_t rondel_file_key_count(const rondel_file *file);
const char *rondel_file_key_name(const rondel_file *file, int64_t index, uint64_t *length);
int32_t rondel_file_key_type(const rondel_file *file, int64_t index);          /* GGUF value type, 9 = array */
int32_t rondel_file_key_element_type(const rondel_file *file, int64_t index);  /* of an array, else the type */
uint64_t rondel_file_key_count_of(const rondel_file *file, int64_t index);     /* elements; 1 for a scalar */
/* The value as it lies in the file (strings: u64 length, then bytes), already checked to be in bounds. */
const void *rondel_file_key_data(const rondel_file *file, int64_t index, uint64_t *bytes);
int64_t rondel_file_tensor_count(const rondel_file *file);
const char *rondel_file_tensor_name(const rondel_file *file, int64_t index);
int32_t rondel_file_tensor_type(const rondel_file *file, int64_t index);       /* ggml type number */
const char *rondel_file_tensor_format(const rondel_file *file, int64_t index); /* resolves rondel.tensor.* */
int32_t rondel_file_tensor_shape(const rondel_file *file, int64_t index, uint64_t shape[4]); /* ne0 first; returns dims */
const void *rondel_file_tensor_data(const rondel_file *file, int64_t index, uint64_t *bytes, uint64_t *offset);
int32_t rondel_file_tensor_shard(const rondel_file *file, int64_t index);      /* which file its offset counts in */
/* 0 = every block scale is finite; 1 = not (last_error names the tensor and the block); <0 = cannot check */
int32_t rondel_file_tensor_check(const rondel_file *file, int64_t index);

/* ---- a model: names bound to fields, shapes checked, weights in place from the map ---- */
typedef struct rondel_model rondel_model;
rondel_model *rondel_model_open(const char *path);
void rondel_model_close(rondel_model *model);
const rondel_file *rondel_model_file(const rondel_model *model);
const char *rondel_model_warning(const rondel_model *model, int32_t index); /* NULL past the last */
int32_t rondel_model_vocabulary(const rondel_model *model);
int32_t rondel_model_width(const rondel_model *model);
int32_t rondel_model_context(const rondel_model *model);    /* trained context length */
int32_t rondel_model_layers(const rondel_model *model);
int32_t rondel_model_steps(const rondel_model *model, int32_t replication); /* layer executions a token */

/* ---- a session: one inference timeline (KV cache and scratch) on a model that outlives it ---- */
typedef struct rondel_session rondel_session;
/* kv: "auto" (F32 for an F32 model, else F16), "F16", "F32"; replication 0 runs the base path */
rondel_session *rondel_session_new(const rondel_model *model, int32_t context, int32_t batch, int32_t threads,
                                   const char *kv, int32_t replication);
void rondel_session_free(rondel_session *session);
/* Evaluates n tokens from `position` on (must be <= tokens held; later ones are forgotten).
 * logits: (n, vocabulary) where all != 0, else (1, vocabulary) of the last token; NULL: none. */
int32_t rondel_session_eval(rondel_session *session, const int32_t *tokens, int32_t n, int32_t position, int32_t all,
                            float *logits);
int32_t rondel_session_length(const rondel_session *session);      /* tokens held */
uint64_t rondel_session_bytes_read(const rondel_session *session); /* by the last eval: weights and KV */
uint64_t rondel_session_memory(const rondel_session *session);     /* KV cache and scratch, bytes */

/* ---- sampling ---- */
typedef struct rondel_sampler rondel_sampler;
rondel_sampler *rondel_sampler_new(float temperature, int32_t top_k, float top_p, float min_p, float repeat_penalty,
                                   int32_t repeat_last, uint64_t seed);
void rondel_sampler_free(rondel_sampler *sampler);
void rondel_sampler_accept(rondel_sampler *sampler, int32_t token); /* a token of the prompt or of the answer */
int32_t rondel_sampler_next(rondel_sampler *sampler, const float *logits, int32_t vocabulary);

/* ---- the machine ---- */
int32_t rondel_cpu_count(void);                                   /* cores this process may use */
double rondel_clock_rate(void);                                   /* cycles a second of this core at this moment */
double rondel_read_bandwidth(int32_t threads, uint64_t bytes);    /* bytes a second, best of several passes */

#endif
