// Packs trees (a root and the leaves under it) into rows of at most `budget` tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace realign {

// The same fields, in the same order, as ForestPacking in realign_kernels/refcache/packing.py.
struct ForestPacking {
  std::vector<int64_t> tree_root;    // (M,) root of each tree; trees in row-major order
  std::vector<int64_t> tree_row;     // (M,)
  std::vector<int64_t> tree_start;   // (M,) first column of the root
  std::vector<int64_t> leaf_tree;    // (L,)
  std::vector<int64_t> leaf_start;   // (L,) first column of the leaf
  std::vector<int64_t> row_lengths;  // (rows,)
};

// Lengths are positive, every root has a leaf, and root + leaf <= budget for each leaf: the caller
// checks. Under these conditions no sum here leaves int64: all are at most `budget`.
ForestPacking pack_forest(const int64_t* root_lengths,  // (R,)
                          int64_t num_roots,
                          const int64_t* leaf_lengths,  // (L,)
                          const int64_t* leaf_roots,    // (L,) in [0, R)
                          int64_t num_leaves,
                          int64_t budget);

}  // namespace realign
