// Tests the table of reference log-probs: checksums, faults, concurrent readers and writers. It
// also tests the staging ring with threads, so it has all tests that need the thread sanitizer.
// tests/csrc/test_csrc.py runs it under sanitizers. Arguments: a working folder, the number of
// faults, and the seconds for the threads. Exits with 1 on a failure.
#include <sys/resource.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "refcache/crc32c.h"
#include "refcache/table.h"
#include "staging/staging_host.h"
#include "table_fixture.h"

using namespace realign;
namespace fs = std::filesystem;

namespace {

void test_crc() {
  std::vector<uint8_t> zeros(32), ones(32, 0xff), up(32), down(32);
  for (int i = 0; i < 32; ++i) up[i] = static_cast<uint8_t>(i), down[31 - i] = up[i];
  const std::pair<std::vector<uint8_t>, uint32_t> vectors[] = {
      {zeros, 0x8A9136AA}, {ones, 0x62A8AB43}, {up, 0x46DD794E}, {down, 0x113FDB5C},
      {{'1', '2', '3', '4', '5', '6', '7', '8', '9'}, 0xE3069283}, {{}, 0}};
  for (const auto& [bytes, crc] : vectors) {
    expect(crc32c(bytes.data(), bytes.size()) == crc, "CRC vector");
    expect(crc32c_tables(bytes.data(), bytes.size(), 0) == crc, "CRC vector by tables");
  }
  std::mt19937 random(0);
  std::vector<uint8_t> bytes(300);
  for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
  for (size_t size = 0; size < 270; ++size) {
    const uint8_t* from = bytes.data() + size % 17;
    const uint32_t whole = crc32c_tables(from, size, 0), seed = crc32c_tables(from, size / 3, 0);
    expect(crc32c_tables(from + size / 3, size - size / 3, seed) == whole, "CRC in two parts");
    expect(crc32c(from, size) == whole, "CRC by instruction and by tables");
  }
}

void test_refresh() {
  const std::string folder = fresh("refresh");
  Table reader(folder, kPrint), one(folder, kPrint), two(folder, kPrint);
  insert(one, 0, 100);
  insert(two, 50, 100);
  expect(reader.refresh() == 150, "new keys");
  // The last two records are zeros at first, as if their bytes arrived late.
  const std::string path = folder + "/00001.log";
  insert(two, 200, 10);
  const auto bytes = read_file(path);
  auto late = bytes;
  std::fill(late.end() - 64, late.end(), uint8_t{0});
  write_file(path, late);
  expect(reader.refresh() == 8 && reader.stats().bad == 2, "late bytes");
  expect(reader.refresh() == 0 && reader.stats().bad == 2, "counted once");
  write_file(path, bytes);
  expect(reader.refresh() == 2 && reader.stats().bad == 0, "late bytes that arrived");
  one.close();
  two.close();
  expect(compact_table(folder, kPrint).logs_merged == 2, "merged under the reader");
  expect(reader.refresh() == 0 && reader.stats().logs == 1, "after a compaction");
  // A new log with an old name, longer than the old log at its last read.
  Table three(folder, kPrint);
  insert(three, 1000, 500);
  expect(three.writer() == "00000" && reader.refresh() == 500, "a new log with an old name");
  expect(count_right(reader, 1000, 500) == 500 && reader.stats().repeats.conflicts == 0, "right");
}

// The limit on file sizes simulates a full disk: a short write, then an error.
void test_full_disk() {
  std::signal(SIGXFSZ, SIG_IGN);
  const std::string folder = fresh("full");
  Table table(folder, kPrint);
  insert(table, 0, 10);
  rlimit before, limit;
  getrlimit(RLIMIT_FSIZE, &before);
  for (const int refused : {0, EIO}) {
    truncate_error = refused;  // the torn record cannot be truncated
    limit = before;
    limit.rlim_cur = static_cast<rlim_t>(fs::file_size(folder + "/00000.log")) + 32 * 5 + 9;
    setrlimit(RLIMIT_FSIZE, &limit);
    const int64_t first = refused ? 100 : 10;
    std::string error = thrown([&] { insert(table, first, 20); });
    expect(has(error, "5 of 20 records were written and are kept"), error);
    expect(count_right(table, first, 20) == 5, "the whole records are kept");
    expect(refused || fs::file_size(folder + "/00000.log") % 32 == 0, "the torn one is truncated");
    setrlimit(RLIMIT_FSIZE, &before);
    if (refused) {
      error = thrown([&] { insert(table, first, 20); });
      expect(has(error, "truncating a log"), error);
      truncate_error = 0;
    }
    expect(insert(table, first, 20) == 15, "insert works again");
  }
  Table again(folder, kPrint);
  expect(count_right(again, 0, 200) == 50 && again.stats().bad == 0, "all records exist");
  truncate_error = 0;
  limit.rlim_cur = 16;  // not even a header
  setrlimit(RLIMIT_FSIZE, &limit);
  const std::string error = thrown([&] { insert(again, 500, 5); });
  expect(has(error, "no record was written"), error);
  setrlimit(RLIMIT_FSIZE, &before);
  expect(count_right(again, 500, 5) == 0 && insert(again, 500, 5) == 5, "a torn header");
}

void test_system_errors() {
  std::string folder = fresh("locks");
  flock_error = ENOLCK;
  {
    Table one(folder, kPrint), two(folder, kPrint), named(folder, kPrint, "name");
    expect(insert(one, 0, 5) == 5 && insert(two, 5, 5) == 5, "no locks");
    expect(one.writer() != two.writer() && one.writer()->rfind("w-", 0) == 0, "unique names");
    expect(has(thrown([&] { insert(named, 10, 5); }), "has no locks"), "a name without locks");
    expect(has(thrown([&] { compact_table(folder, kPrint); }), "has no locks"), "compaction");
  }
  flock_error = 0;
  Table table(folder, kPrint);
  expect(count_right(table, 0, 10) == 10, "both logs are read");
  insert(table, 10, 1);
  sync_error = EIO;
  expect(has(thrown([&] { table.sync(); }), "syncing a log"), "sync fails");
  expect(has(thrown([&] { table.close(); }), "syncing a log"), "close fails");
  sync_error = 0;
  expect(thrown([&] { table.close(); }).empty(), "closed after the failure");
  expect(insert(*std::make_unique<Table>(folder, kPrint, "00000"), 20, 1) == 1, "released");

  folder = fresh("version");
  insert(*std::make_unique<Table>(folder, kPrint), 0, 1);
  auto bytes = read_file(folder + "/00000.log");
  Header header = make_header(kPrint);
  header.version = 2;
  header.crc = crc32c(&header, sizeof(header) - 4);
  std::memcpy(bytes.data(), &header, sizeof(header));
  write_file(folder + "/00000.log", bytes);
  expect(has(thrown([&] { Table(folder, kPrint); }), "has version 2 of the format"), "version");

  folder = fresh("file");
  write_file(folder, {1, 2, 3});
  expect(has(thrown([&] { Table(folder, kPrint); }), "A table is a folder"), "a file");
  for (const char* name : {"", ".x", "a/b", "a b", "+compacted-00000"}) {
    expect(has(thrown([&] { Table(root + "/none", kPrint, name); }), "writer is '"), name);
  }
}

// A compaction moves a log while other processes look for it.
void test_vanishing_logs() {
  const std::string folder = fresh("vanish"), path = folder + "/00000.log";
  insert(*std::make_unique<Table>(folder, kPrint), 0, 10);
  empty_listings = 2;  // the old name is removed, and the new one not listed yet
  Table reader(folder, kPrint);
  expect(empty_listings == 0 && count_right(reader, 0, 10) == 10, "listed again at opening");
  empty_listings = 1;
  expect(reader.refresh() == 0 && reader.stats().logs == 1, "listed again at refresh");
  Table writer(folder, kPrint);
  vanishing = path.c_str();
  expect(insert(writer, 10, 10) == 10 && fs::file_size(path) == 32 * 11, "opened again");
}

// Another process that changes the folder all the time blocks neither readers nor writers.
void test_endless_changes() {
  const std::string folder = fresh("endless"), path = folder + "/00000.log";
  insert(*std::make_unique<Table>(folder, kPrint), 0, 10);
  flips_listings = true;
  Table reader(folder, kPrint);
  flips_listings = false;
  expect(count_right(reader, 0, 10) == 10, "listings that differ every time");
  vanishing = path.c_str();
  keeps_vanishing = true;
  Table writer(folder, kPrint);
  const std::string error = thrown([&] { Table(folder, kPrint, "00000"); });
  expect(has(error, "another process replaces all the time"), error);
  keeps_vanishing = false;
  vanishing = nullptr;
}

// A compaction that stops at any step loses no records, and the next one completes.
void test_compaction_stops() {
  const std::string folder = fresh("stops");
  for (int64_t name = 0; name < 3; ++name) {
    Table table(folder, kPrint, std::to_string(name));
    insert(table, 10 * name, 10);
  }
  Table reader(folder, kPrint);
  for (int* error : {&flock_error, &unlink_error}) {
    *error = EIO;
    expect(!thrown([&] { compact_table(folder, kPrint); }).empty(), "a compaction stops");
    *error = 0;
    expect(reader.refresh() == 0, "a reader loses nothing");
    expect(count_right(Table(folder, kPrint), 0, 30) == 30, "nothing is lost");
  }
  const Compaction done = compact_table(folder, kPrint);
  expect(done.logs_merged == 4 && done.duplicates_dropped == 30 && done.records == 30, "finished");
  expect(count_right(Table(folder, kPrint), 0, 30) == 30, "nothing is lost in the end");
}

// Faults of a log after a crash of a process or an error of a disk.
void test_faults(int rounds) {
  const std::string folder = fresh("faults"), path = folder + "/00000.log";
  constexpr int64_t kCount = 200;
  { Table other(fresh("spliced"), Fingerprint{}); insert(other, 0, kCount); }
  const auto foreign = read_file(root + "/spliced/00000.log");
  { Table table(folder, kPrint); insert(table, 0, kCount); }
  const auto bytes = read_file(path);
  std::mt19937 random(1);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  int64_t lost = 0;
  for (int round = 0; round < rounds; ++round) {
    auto broken = bytes;
    const int kind = round % 5;
    if (kind == 0) {
      for (size_t flips = 1 + below(8); flips > 0; --flips) {
        broken[below(broken.size())] ^= static_cast<uint8_t>(1 << below(8));
      }
    } else if (kind == 1) {
      broken.resize(below(broken.size()));
    } else if (kind == 2) {
      const size_t page = 4096 * below(broken.size() / 4096 + 1);
      std::fill(broken.begin() + page, broken.begin() + std::min(broken.size(), page + 4096), 0);
    } else {
      // A chunk of another table, or of another place in this log, as whole records or not.
      const auto& from = kind == 3 ? foreign : bytes;
      const size_t step = below(2) ? 32 : 1, size = 1 + below(2000);
      const size_t source = 32 + below(from.size() - 32 - size) / step * step;
      const size_t target = below(broken.size() - size) / step * step;
      std::copy_n(from.begin() + source, size, broken.begin() + target);
    }
    write_file(path, broken);
    fs::remove(folder + "/00001.log");
    // Counts the records that are still in their place. Spliced records may have copies elsewhere.
    int64_t intact = 0, damaged = 0;
    for (size_t at = 32; at + 32 <= broken.size(); at += 32) {
      const bool same = std::memcmp(broken.data() + at, bytes.data() + at, 32) == 0;
      ++(same ? intact : damaged);
    }
    const bool header = broken.size() >= 32 && std::memcmp(broken.data(), bytes.data(), 32) != 0;
    const std::string what = "fault " + std::to_string(round);
    Table reader(folder, kPrint, std::nullopt, true);
    const int64_t found = count_right(reader, 0, kCount);
    const TableStats stats = reader.stats();
    expect(found >= intact && found <= static_cast<int64_t>(broken.size() / 32), what);
    expect(kind == 4 || found == intact, what + ": found the intact records");
    // Every damaged place counts, unless it holds a good record from elsewhere.
    const int64_t moved = stats.repeats.duplicates + found - intact;
    expect(stats.bad + moved == damaged + header, what + ": counted");
    expect(stats.repeats.conflicts == 0, what + ": conflicts");
    expect(stats.torn_bytes == static_cast<int64_t>(broken.size() % 32), what + ": torn bytes");
    lost += kCount - found;
    Table writer(folder, kPrint);
    expect(insert(writer, 0, kCount) == static_cast<size_t>(kCount - found), what + ": refilled");
    // A file without the header is left as it is.
    const bool usable = broken.empty() || (broken.size() >= 32 && !header);
    expect(usable || read_file(path) == broken, what + ": unchanged");
    expect(found == kCount || writer.writer() == (usable ? "00000" : "00001"), what + ": log");
    expect(reader.refresh() == static_cast<size_t>(kCount - found), what + ": refreshed");
    writer.close();
    Table after(folder, kPrint);
    expect(count_right(after, 0, kCount) == kCount, what + ": all records exist again");
  }
  expect(lost > rounds, "faults that lose records");
  std::printf("%d faults lost %ld records\n", rounds, static_cast<long>(lost));
}

// Writers and readers share one Table. Another writer has a separate log, which compactions merge.
// tests/refcache/test_store.py has the same test with processes.
void test_threads(double seconds) {
  const std::string folder = fresh("threads");
  constexpr int64_t kWriters = 4, kSpan = int64_t{1} << 40;  // keys of writer w start at w * kSpan
  std::atomic<bool> stop{false};
  std::vector<std::atomic<int64_t>> written(kWriters);
  std::atomic<int64_t> checked{0}, compactions{0};
  for (int64_t w : {0, 1}) {  // two free logs, so that the first compaction merges
    insert(*std::make_unique<Table>(folder, kPrint, std::to_string(w)), w * kSpan, 64);
  }
  Table shared(folder, kPrint);
  std::vector<std::thread> threads;
  for (int64_t w = 0; w < kWriters; ++w) {
    threads.emplace_back([&, w] {
      for (int64_t round = w < 2 ? 1 : 0; !stop; ++round) {
        std::unique_ptr<Table> own;
        if (w == 0) own = std::make_unique<Table>(folder, kPrint);
        expect(insert(own ? *own : shared, w * kSpan + round * 64, 64) == 64, "64 new records");
        written[w] = round * 64 + 64;
        own.reset();  // releases its log for a compaction
        std::this_thread::sleep_for(std::chrono::microseconds(500));
      }
    });
    threads.emplace_back([&, w] {
      std::mt19937 random(static_cast<unsigned>(w));
      while (!stop) {
        const int64_t from = static_cast<int64_t>(random() % kWriters), there = written[from];
        shared.refresh();
        if (there == 0) continue;
        const int64_t count = std::min<int64_t>(there, 256);
        const int64_t first = static_cast<int64_t>(random()) % (there - count + 1);
        expect(count_right(shared, from * kSpan + first, count) == count, "a lost record");
        checked += count;
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop) {
      compactions += compact_table(folder, kPrint).logs_merged > 0;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  });
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  stop = true;
  for (auto& thread : threads) thread.join();
  const Table table(folder, kPrint);
  int64_t total = 0;
  for (int64_t w = 0; w < kWriters; ++w) {
    expect(count_right(table, w * kSpan, written[w]) == written[w], "all records at the end");
    total += written[w];
  }
  expect(static_cast<int64_t>(table.size()) == total && table.stats().bad == 0, "no other records");
  expect(total > 0 && checked > 0 && compactions > 0, "all threads were active");
}

void test_a_thread_may_push_while_another_pops() {
  constexpr int rounds = 500;
  const auto ring = make_host_staging(3);
  std::thread producer([&] {
    for (int round = 0; round < rounds; ++round) {
      while (ring->pending() == ring->slots()) std::this_thread::yield();
      const float values[] = {static_cast<float>(round), 1};
      const int64_t offsets[] = {0, 1, 2};
      ring->push(values, 2, offsets, 2, nullptr);
    }
  });
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    while (ring->pending() == 0) std::this_thread::yield();
    wrong += ring->pop() != std::vector<double>{static_cast<double>(round), 1};
  }
  producer.join();
  expect(wrong == 0, "sums in order over two threads");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::printf("usage: table_tests FOLDER FAULTS SECONDS\n");
    return 2;
  }
  root = argv[1];
  test_crc();
  test_refresh();
  test_full_disk();
  test_system_errors();
  test_vanishing_logs();
  test_endless_changes();
  test_compaction_stops();
  test_faults(std::atoi(argv[2]));
  test_threads(std::atof(argv[3]));
  test_a_thread_may_push_while_another_pops();
  return report();
}
