#include "refcache/packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

namespace realign {
namespace {

struct Bins {
  std::vector<int64_t> order;   // (n,) items in the order they were placed
  std::vector<int64_t> bin;     // (n,) bin of each item
  std::vector<int64_t> filled;  // (bins,) sum of the lengths in each bin
};

// Puts items, longest first (ties: smallest index), into the bin with the least sufficient room
// (ties: smallest bin).
Bins best_fit_decreasing(const std::vector<int64_t>& lengths, int64_t capacity) {
  Bins bins;
  bins.order.resize(lengths.size());
  bins.bin.resize(lengths.size());
  std::iota(bins.order.begin(), bins.order.end(), int64_t{0});
  std::stable_sort(bins.order.begin(), bins.order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  // Bins that are too full for the shortest item are dropped. With few trees per row these are most
  // bins, and 1M trees pack in 0.3 s instead of 1.0 s.
  const int64_t shortest = lengths.empty() ? 0 : lengths[bins.order.back()];
  std::set<std::pair<int64_t, int64_t>> rooms;  // (room left, bin)
  for (const int64_t item : bins.order) {
    const int64_t length = lengths[item];
    auto room_and_bin = std::make_pair(capacity, static_cast<int64_t>(bins.filled.size()));
    const auto best = rooms.lower_bound({length, 0});
    if (best == rooms.end()) {
      bins.filled.push_back(0);
    } else {
      room_and_bin = *best;
      rooms.erase(best);
    }
    bins.bin[item] = room_and_bin.second;
    bins.filled[room_and_bin.second] += length;
    room_and_bin.first -= length;
    if (room_and_bin.first >= shortest) rooms.insert(room_and_bin);
  }
  return bins;
}

// Leaves of each root in index order. Root r has grouped[offsets[r]:offsets[r + 1]].
struct Groups {
  std::vector<int64_t> offsets;
  std::vector<int64_t> grouped;
};

// A stable counting sort of `keys` in [0, num_keys), visiting `order`.
Groups group_by(const int64_t* keys, const std::vector<int64_t>& order, int64_t num_keys) {
  Groups groups;
  groups.offsets.assign(num_keys + 1, 0);
  groups.grouped.resize(order.size());
  for (const int64_t item : order) ++groups.offsets[keys[item] + 1];
  std::partial_sum(groups.offsets.begin(), groups.offsets.end(), groups.offsets.begin());
  std::vector<int64_t> cursor(groups.offsets.begin(), groups.offsets.end() - 1);
  for (const int64_t item : order) groups.grouped[cursor[keys[item]]++] = item;
  return groups;
}

}  // namespace

void check_forest(const int64_t* root_lengths, int64_t num_roots, const int64_t* leaf_lengths,
                  const int64_t* leaf_roots, int64_t num_leaves, int64_t budget) {
  for (int64_t root = 0; root < num_roots; ++root) {
    if (root_lengths[root] < 1 || root_lengths[root] >= budget) {
      throw std::invalid_argument("root_lengths must be in [1, budget)");
    }
  }
  for (int64_t leaf = 0; leaf < num_leaves; ++leaf) {
    const int64_t parent = leaf_roots[leaf];
    if (parent < 0 || parent >= num_roots) {
      throw std::invalid_argument("leaf_roots must be in [0, len(root_lengths))");
    }
    if (leaf_lengths[leaf] < 1 || leaf_lengths[leaf] > budget - root_lengths[parent]) {
      throw std::invalid_argument("leaf_lengths must be in [1, budget - root]");
    }
  }
}

ForestPacking pack_forest(const int64_t* root_lengths,
                          int64_t num_roots,
                          const int64_t* leaf_lengths,
                          const int64_t* leaf_roots,
                          int64_t num_leaves,
                          int64_t budget) {
  ForestPacking packing;
  packing.leaf_tree.resize(num_leaves);
  packing.leaf_start.resize(num_leaves);

  // Trees in order of (root, part). A root whose leaves fit into the budget has one tree. Other
  // roots are split by best fit.
  std::vector<int64_t> leaf_order(num_leaves);
  std::iota(leaf_order.begin(), leaf_order.end(), int64_t{0});
  const Groups groups = group_by(leaf_roots, leaf_order, num_roots);
  std::vector<int64_t> part_root, part_length, own_lengths;
  for (int64_t root = 0; root < num_roots; ++root) {
    const int64_t* leaves = groups.grouped.data() + groups.offsets[root];
    const int64_t count = groups.offsets[root + 1] - groups.offsets[root];
    const int64_t capacity = budget - root_lengths[root];
    int64_t room = capacity;
    for (int64_t i = 0; i < count && room >= 0; ++i) room -= leaf_lengths[leaves[i]];

    const auto first_part = static_cast<int64_t>(part_root.size());
    if (room >= 0) {
      part_root.push_back(root);
      part_length.push_back(budget - room);
      for (int64_t i = 0; i < count; ++i) packing.leaf_tree[leaves[i]] = first_part;
      continue;
    }
    own_lengths.resize(count);
    for (int64_t i = 0; i < count; ++i) own_lengths[i] = leaf_lengths[leaves[i]];
    const Bins parts = best_fit_decreasing(own_lengths, capacity);
    for (const int64_t filled : parts.filled) {
      part_root.push_back(root);
      part_length.push_back(root_lengths[root] + filled);
    }
    for (int64_t i = 0; i < count; ++i) {
      packing.leaf_tree[leaves[i]] = first_part + parts.bin[i];
    }
  }

  // Packs trees into rows. Trees in a row keep the order of their placement.
  Bins rows = best_fit_decreasing(part_length, budget);
  const auto num_rows = static_cast<int64_t>(rows.filled.size());
  const std::vector<int64_t> row_major = group_by(rows.bin.data(), rows.order, num_rows).grouped;
  packing.row_lengths = std::move(rows.filled);

  const auto num_trees = static_cast<int64_t>(part_root.size());
  packing.tree_root.resize(num_trees);
  packing.tree_row.resize(num_trees);
  packing.tree_start.resize(num_trees);
  std::vector<int64_t> tree_of_part(num_trees), next_leaf(num_trees), next_tree(num_rows, 0);
  for (int64_t tree = 0; tree < num_trees; ++tree) {
    const int64_t part = row_major[tree];
    const int64_t root = part_root[part];
    const int64_t row = rows.bin[part];
    packing.tree_root[tree] = root;
    packing.tree_row[tree] = row;
    packing.tree_start[tree] = next_tree[row];
    next_leaf[tree] = next_tree[row] + root_lengths[root];
    next_tree[row] += part_length[part];
    tree_of_part[part] = tree;
  }
  for (int64_t leaf = 0; leaf < num_leaves; ++leaf) {
    const int64_t tree = tree_of_part[packing.leaf_tree[leaf]];
    packing.leaf_tree[leaf] = tree;
    packing.leaf_start[leaf] = next_leaf[tree];
    next_leaf[tree] += leaf_lengths[leaf];
  }
  return packing;
}

}  // namespace realign
