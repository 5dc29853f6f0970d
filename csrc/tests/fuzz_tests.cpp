// Random faults for the table and the packing, beyond the cases of table_tests and core_tests. Each
// input is a folder with mutated logs, links and pipes, or lengths of a forest. It depends on
// its seed only. Arguments: seconds, the first seed, and a working folder. With 0 seconds it runs
// one input, which repeats a failure. Exits with 1 on a failure.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "refcache/crc32c.h"
#include "refcache/packing.h"
#include "refcache/table.h"
#include "table_fixture.h"

using namespace realign;
namespace fs = std::filesystem;

namespace {

using Bytes = std::vector<uint8_t>;
using Key = std::string;
using Value = std::pair<double, int32_t>;

const Fingerprint kOther = {9, 9, 9};
std::mt19937_64 random_bits;
std::string what;  // the input, for messages

uint64_t below(uint64_t n) { return random_bits() % n; }
bool chance(int percent) { return below(100) < static_cast<uint64_t>(percent); }

template <class T>
const T& pick(const std::vector<T>& from) {
  return from[below(from.size())];
}

void require(bool held, const std::string& message) { expect(held, what + ": " + message); }

// A log of a table, with records whose numbers start at `first`.
Bytes valid_log(const Fingerprint& fingerprint, int64_t first, int64_t count) {
  const Batch batch(first, count);
  const Header header = make_header(fingerprint);
  Bytes log(32 * static_cast<size_t>(count + 1));
  std::memcpy(log.data(), &header, 32);
  for (int64_t i = 0; i < count; ++i) {
    Record record{};
    std::memcpy(record.key, batch.keys.data() + 16 * i, 16);
    record.logp = batch.logps[i];
    record.tokens = batch.tokens[i];
    if (chance(3)) record.logp = pick<double>({0.0, 7.5, -1e308, INFINITY, NAN});
    if (chance(3)) record.tokens = pick<int32_t>({0, -1, 1, INT32_MIN, INT32_MAX});
    record.crc = record_crc(record, crc32c(fingerprint.data(), fingerprint.size()));
    std::memcpy(log.data() + 32 * (i + 1), &record, 32);
  }
  return log;
}

Bytes mutated() {
  const Fingerprint& own = chance(90) ? kPrint : kOther;
  Bytes log = valid_log(own, static_cast<int64_t>(below(60)), static_cast<int64_t>(below(40)));
  for (uint64_t changes = below(4); changes > 0; --changes) {
    const Bytes other = valid_log(chance(50) ? kPrint : kOther, 100, 20);
    const size_t size = log.size(), at = below(size + 1), rest = size - at;
    switch (below(7)) {
      case 0:
        if (size > 0) log[below(size)] ^= static_cast<uint8_t>(1 << below(8));
        break;
      case 1:
        log.resize(at);
        break;
      case 2:
        std::fill_n(log.begin() + at, below(rest + 1), uint8_t{0});
        break;
      case 3:  // a splice, of whole records or not
        log.insert(log.begin() + (chance(50) ? at / 32 * 32 : at), other.begin(),
                   other.begin() + below(other.size()));
        break;
      case 4:  // another header
        std::copy_n(other.begin(), std::min<size_t>(32, size), log.begin());
        break;
      case 5:
        for (size_t i = at; i < std::min(size, at + 40); ++i) log[i] = random_bits() & 255;
        break;
      default: {  // an intact header with another version
        Header header = make_header(kPrint);
        header.version = static_cast<uint32_t>(random_bits());
        if (chance(50)) header.crc = crc32c(&header, sizeof(header) - 4);
        if (chance(20)) std::memcpy(log.data(), &header, std::min<size_t>(32, size));
      }
    }
  }
  return log;
}

std::string random_log_name() {
  if (chance(20)) return "+compacted-" + std::to_string(random_bits() >> below(64)) + ".log";
  return pick<std::string>({"00000.log", "00001.log", "00002.log", "a.log", "zz.log", "-.log",
                            "+compacted-00000.log", "+compacted-99999999999999999999.log",
                            "+compacted--1.log", ".hidden.log", "no log", "\x1b[2J.log"});
}

// The files around the table, which no call may change.
class Outside {
 public:
  Outside() : folder_(fresh("outside")), text_(valid_log(kPrint, 500, 3)) {
    if (chance(50)) text_.assign(77, 'x');
    fs::create_directories(folder_ + "/folder");
    write_file(file(), text_);
  }
  std::string file() const { return folder_ + "/file"; }
  void check() const {
    size_t entries = 0;
    for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
      entries += !entry.path().empty();
    }
    require(entries == 2 && read_file(file()) == text_, "a file outside has changed");
  }
  void plant(const std::string& path) const {
    switch (below(7)) {
      case 0:
        return fs::create_symlink(file(), path);
      case 1:
        return fs::create_symlink(folder_ + "/new", path);
      case 2:
        return fs::create_hard_link(file(), path);
      case 3:
        return fs::create_symlink(folder_ + "/folder", path);
      case 4:
        require(mkfifo(path.c_str(), 0600) == 0, "making a pipe");
        return;
      case 5:
        require(mknod(path.c_str(), S_IFSOCK | 0600, 0) == 0, "making a socket");
        return;
      default:
        fs::create_directories(path);
    }
  }

 private:
  std::string folder_;
  Bytes text_;
};

// The values with a correct check in the regular logs, by key.
std::map<Key, std::set<Value>> good_values(const std::string& folder) {
  std::map<Key, std::set<Value>> values;
  const uint32_t seed = crc32c(kPrint.data(), kPrint.size());
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    const bool is_log = name.size() > 4 && name.substr(name.size() - 4) == ".log";
    if (!is_log || !plain_name(name[0] == '+' ? name.substr(1) : name)) continue;
    if (entry.is_symlink() || !entry.is_regular_file()) continue;
    Bytes bytes(std::min<size_t>(fs::file_size(entry.path()), 1 << 16));  // the rest is a hole
    FILE* file = std::fopen(entry.path().c_str(), "rb");
    bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
    std::fclose(file);
    for (size_t at = 32; at + 32 <= bytes.size(); at += 32) {
      Record record;
      std::memcpy(&record, bytes.data() + at, 32);
      if (record_crc(record, seed) != record.crc || record.tokens < 1) continue;
      if (!std::isfinite(record.logp)) continue;
      const Key key(reinterpret_cast<const char*>(record.key), 16);
      values[key].insert({record.logp, record.tokens});
    }
  }
  return values;
}

void check_values(const Table& table, const std::map<Key, std::set<Value>>& values) {
  for (const auto& [key, known] : values) {
    double logp;
    int32_t tokens;
    table.lookup(reinterpret_cast<const uint8_t*>(key.data()), 1, &logp, &tokens);
    require(known.count({logp, tokens}) == 1, "a value without a correct check, or a lost value");
  }
  const Batch absent(int64_t{1} << 50, 5);
  double logps[5];
  int32_t tokens[5];
  table.lookup(absent.keys.data(), 5, logps, tokens);
  for (int i = 0; i < 5; ++i) require(std::isnan(logps[i]) && tokens[i] == 0, "an unknown key");
}

// One call, which may refuse its input by these two exceptions only.
template <class Call>
void allowed(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
  } catch (const FileError&) {
  }
}

void fuzz_table() {
  const std::string folder = fresh("fuzz");
  const Outside outside;
  fs::create_directories(folder);
  std::map<std::string, Bytes> strange;  // files that are no logs, and must stay as they are
  const Header header = make_header(kPrint);
  for (uint64_t files = 1 + below(5); files > 0; --files) {
    const std::string path = folder + "/" + random_log_name();
    if (fs::symlink_status(path).type() != fs::file_type::not_found) continue;
    if (chance(30)) {
      outside.plant(path);
      continue;
    }
    const auto filler = static_cast<uint8_t>(below(256));
    const Bytes bytes = chance(80) ? mutated() : Bytes(below(200), filler);
    write_file(path, bytes);
    const bool ours = bytes.size() >= 32 && std::memcmp(bytes.data(), &header, 32) == 0;
    if (!ours && !bytes.empty() && good_values(folder).empty()) strange[path] = bytes;
    if (chance(5)) {
      fs::resize_file(path, bytes.size() + (uintmax_t{1} << (20 + below(22))));
      strange.erase(path);
    }
  }
  if (chance(10)) outside.plant(folder + "/.compact-" + std::to_string(geteuid()) + ".lock");

  std::unique_ptr<Table> table;
  std::map<Key, std::set<Value>> acknowledged;
  int64_t next = 1000;
  for (uint64_t calls = 1 + below(8); calls > 0; --calls) {
    allowed([&] {
      const auto choice = below(5);
      if (!table || choice == 0) {
        const bool read_only = chance(20);
        std::optional<std::string> writer;
        if (!read_only && chance(20)) writer = pick<std::string>({"a", "00000", "mine"});
        table.reset();  // releases its log
        const auto values = good_values(folder);
        table = std::make_unique<Table>(folder, kPrint, writer, read_only);
        check_values(*table, values);
      } else if (choice == 1) {
        table->refresh();
      } else if (choice == 2) {
        const auto count = static_cast<int64_t>(1 + below(20));
        insert(*table, next, count);
        require(count_right(*table, next, count) == count, "an acknowledged record is lost");
        const Batch batch(next, count);
        for (int64_t i = 0; i < count; ++i) {
          const Key key(reinterpret_cast<const char*>(batch.keys.data() + 16 * i), 16);
          acknowledged[key].insert({batch.logps[i], batch.tokens[i]});
        }
        next += count;
      } else if (choice == 3) {
        compact_table(folder, kPrint);
        check_values(*std::make_unique<Table>(folder, kPrint), good_values(folder));
      } else if (chance(50)) {
        const std::string path = folder + "/late.log";
        if (chance(50)) fs::remove_all(path);
        if (fs::symlink_status(path).type() == fs::file_type::not_found && chance(30)) {
          outside.plant(path);
        } else if (fs::is_regular_file(path) && !fs::is_symlink(path) &&
                   fs::hard_link_count(path) == 1) {
          write_file(path, mutated());  // other bytes in the same file
        }
      }
    });
  }
  table.reset();
  allowed([&] {
    const Table after(folder, kPrint, std::nullopt, true);
    check_values(after, acknowledged);
    check_values(after, good_values(folder));
  });
  for (const auto& [path, bytes] : strange) {
    require(read_file(path) == bytes, path + " has changed");
  }
  outside.check();
}

// A length: small, or near the ends of int64.
int64_t random_length() {
  if (chance(97)) return static_cast<int64_t>(1 + below(60));
  const int64_t end = chance(80) ? std::numeric_limits<int64_t>::max() : INT64_MIN;
  return pick<int64_t>({0, -1, end, end / 2, static_cast<int64_t>(random_bits())});
}

void fuzz_packing() {
  std::vector<int64_t> roots(below(12)), leaves(below(60)), parents(leaves.size());
  for (int64_t& root : roots) root = random_length();
  for (size_t i = 0; i < leaves.size(); ++i) {
    leaves[i] = random_length();
    parents[i] = static_cast<int64_t>(below(roots.size() + (chance(2) ? 2 : 0) + (roots.empty())));
    if (chance(1)) parents[i] = random_length();
  }
  const int64_t budget = chance(80) ? static_cast<int64_t>(60 + below(200)) : random_length();
  const auto num_roots = static_cast<int64_t>(roots.size());
  const auto num_leaves = static_cast<int64_t>(leaves.size());
  allowed([&] {
    check_forest(roots.data(), num_roots, leaves.data(), parents.data(), num_leaves, budget);
    const ForestPacking packing = pack_forest(roots.data(), num_roots, leaves.data(),
                                              parents.data(), num_leaves, budget);
    const auto trees = packing.tree_root.size();
    std::vector<std::vector<std::pair<int64_t, int64_t>>> spans(packing.row_lengths.size());
    for (size_t tree = 0; tree < trees; ++tree) {
      const int64_t start = packing.tree_start[tree];
      spans.at(packing.tree_row[tree]).push_back({start, roots.at(packing.tree_root[tree])});
    }
    for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
      const auto tree = static_cast<size_t>(packing.leaf_tree[leaf]);
      require(tree < trees && packing.tree_root[tree] == parents[leaf], "a leaf under its root");
      spans.at(packing.tree_row.at(tree)).push_back({packing.leaf_start[leaf], leaves[leaf]});
    }
    for (size_t row = 0; row < spans.size(); ++row) {  // no gap, no overlap
      std::sort(spans[row].begin(), spans[row].end());
      int64_t end = 0;
      for (const auto& [start, length] : spans[row]) {
        require(start == end && length <= budget - end, "a span in its row");
        end = start + length;
      }
      require(end == packing.row_lengths[row], "the length of a row");
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::printf("usage: fuzz_tests SECONDS SEED FOLDER\n");
    return 2;
  }
  const double seconds = std::atof(argv[1]);
  const uint64_t first = std::strtoull(argv[2], nullptr, 10);
  root = argv[3];
  fake_sync = true;
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  uint64_t seed = first;
  do {
    random_bits.seed(seed);
    what = "input " + std::to_string(seed);
    try {
      for (int forests = 0; forests < 20; ++forests) fuzz_packing();
      fuzz_table();
    } catch (const std::exception& error) {
      require(false, error.what());
    }
    ++seed;
  } while (Clock::now() < end && failures == 0);
  std::printf("%s inputs from seed %s. Repeat one with: fuzz_tests 0 SEED FOLDER\n",
              std::to_string(seed - first).c_str(), argv[2]);
  return report();
}
