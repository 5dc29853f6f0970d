// Packing of trees (a root and its leaves) into rows of at most `budget` tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace realign {

// The same fields, in the same order, as ForestPacking in realign_kernels/refcache/packing.py.
struct ForestPacking {
  std::vector<int64_t> tree_root;    // (M,) root of each tree, with trees in row-major order
  std::vector<int64_t> tree_row;     // (M,)
  std::vector<int64_t> tree_start;   // (M,) first column of the root
  std::vector<int64_t> leaf_tree;    // (L,)
  std::vector<int64_t> leaf_start;   // (L,) first column of the leaf
  std::vector<int64_t> row_lengths;  // (rows,)
};

// Throws std::invalid_argument unless lengths are positive, leaf_roots are indices of roots, and
// root + leaf <= budget for each leaf.
void check_forest(const int64_t* root_lengths, int64_t num_roots, const int64_t* leaf_lengths,
                  const int64_t* leaf_roots, int64_t num_leaves, int64_t budget);

// The caller has called check_forest. All sums are then at most `budget`, so int64 cannot overflow.
ForestPacking pack_forest(const int64_t* root_lengths,  // (R,)
                          int64_t num_roots,
                          const int64_t* leaf_lengths,  // (L,)
                          const int64_t* leaf_roots,    // (L,) in [0, R)
                          int64_t num_leaves,
                          int64_t budget);

}  // namespace realign
