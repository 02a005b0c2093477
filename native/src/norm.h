/* RMSNorm. */
#ifndef RONDEL_NORM_H
#define RONDEL_NORM_H

/* out = weight o x / sqrt(mean(x^2) + epsilon), then o gain where it is not NULL; all (n); out may be x. */
void rms_norm(const float *x, const float *weight, const float *gain, float epsilon, int n, float *out);

#endif
