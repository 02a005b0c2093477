/* The scalar functions behind the table that scalar.c assembles. */
#ifndef RONDEL_SCALAR_H
#define RONDEL_SCALAR_H
#include "declare.h"

DECLARE_BLOCKS(scalar)
DECLARE_CODEBOOKS(scalar)
DECLARE_TILES(scalar)

#endif
