/* Owns the feed-forward part of a layer: down(silu(gate) o up). */
#include "kernels/kernels.h"
#include "pass.h"

static void project_hidden(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    float *gate = pass->session->gate, *up = pass->session->up;
    int64_t hidden = pass->numbers->hidden, first, last;
    pass_linear(pass, ROLE_GATE, pass->rows, gate, thread, threads, &first, &last);
    pass_linear(pass, ROLE_UP, pass->rows, up, thread, threads, &first, &last);
    for (int row = 0; row < pass->rows; row++) {
        const float *gain = parameters_of(pass, row)->hidden_gain;
        int64_t at = row * hidden;
        kernels_current()->swiglu(gate + at + first, up + at + first, last - first);
        for (int64_t i = first; gain && i < last; i++) gate[at + i] *= gain[i];
    }
}

static void read_hidden(struct pass *pass, int row, int thread) {
    float *hidden = pass->session->gate + (int64_t)row * pass->numbers->hidden;
    pass_rotate(pass, pass->layer->hidden_rotation, hidden, 1, thread);
    pass_input(pass, row, hidden);
}

void run_ffn(struct pass *pass) {
    struct pool *pool = pass->session->pool;
    pass_reads(pass, ROLE_GATE, 2);
    pass_each(pass, pass->rows, norm_stream);
    pool_run(pool, project_hidden, pass);
    pass_reads(pass, ROLE_DOWN, 1);
    pass_each(pass, pass->rows, read_hidden);
    pool_run(pool, add_to_stream, pass);
}
