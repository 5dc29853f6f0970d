// Bindings of the table of reference log-probs for realign_kernels/refcache/store.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/arrays.h"
#include "refcache/table.h"

namespace py = pybind11;

namespace {

using realign::Fingerprint;
using realign::Table;

Fingerprint to_fingerprint(const py::bytes& bytes) {
  const std::string text = bytes;
  Fingerprint fingerprint;
  if (text.size() != fingerprint.size()) throw py::value_error("fingerprint must be 16 bytes");
  std::copy(text.begin(), text.end(), fingerprint.begin());
  return fingerprint;
}

// A path or name without a null byte, at which the system would cut it.
const std::string& whole(const std::string& text, const char* name) {
  if (text.find('\0') != std::string::npos) {
    throw py::value_error(std::string(name) + " has a null byte. Use another one.");
  }
  return text;
}

// The table refuses a name with a surrogate. The conversion of pybind11 is a TypeError.
std::optional<std::string> name_of(const std::optional<py::str>& writer) {
  if (!writer) return std::nullopt;
  PyObject* bytes = PyUnicode_AsEncodedString(writer->ptr(), "utf-8", "backslashreplace");
  if (bytes == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes).cast<std::string>();
}

const uint8_t* key_data(const py::array& keys) {
  if (keys.dtype().kind() != 'V' || keys.itemsize() != 16) {
    throw py::value_error("keys must be a contiguous 1-D array of V16");
  }
  realign::check_flat(keys, "keys", "V16");
  return static_cast<const uint8_t*>(keys.data());
}

template <class T>
const T* column(const py::array& array, const char* name, const char* dtype, py::ssize_t size) {
  const T* data = realign::flat<T>(array, name, dtype);
  if (array.size() != size) {
    throw py::value_error(std::string(name) + " must be " + dtype + ", one for each key");
  }
  return data;
}

py::tuple lookup(const Table& table, const py::array& keys) {
  const uint8_t* from = key_data(keys);
  py::array_t<double> logps(keys.size());
  py::array_t<int32_t> tokens(keys.size());
  double* to_logps = logps.mutable_data();
  int32_t* to_tokens = tokens.mutable_data();
  const auto n = static_cast<size_t>(keys.size());
  {
    py::gil_scoped_release release;
    table.lookup(from, n, to_logps, to_tokens);
  }
  return py::make_tuple(logps, tokens);
}

size_t insert(Table& table, const py::array& keys, const py::array& logps,
              const py::array& tokens) {
  const uint8_t* from = key_data(keys);
  const double* values = column<double>(logps, "logps", "float64", keys.size());
  const int32_t* counts = column<int32_t>(tokens, "tokens", "int32", keys.size());
  const auto n = static_cast<size_t>(keys.size());
  py::gil_scoped_release release;
  return table.insert(from, values, counts, n);
}

// Paths need not be UTF-8.
py::object decoded(const std::string& text) {
  PyObject* object = PyUnicode_DecodeFSDefaultAndSize(text.data(), py::ssize_t(text.size()));
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::dict stats(const Table& table) {
  realign::TableStats stats;
  std::optional<std::string> writer;
  {
    py::gil_scoped_release release;
    stats = table.stats();
    writer = table.writer();
  }
  py::dict found;
  found["records"] = stats.records;
  found["logs"] = stats.logs;
  found["bytes"] = stats.bytes;
  found["bad"] = stats.bad;
  found["torn_bytes"] = stats.torn_bytes;
  found["duplicates"] = stats.repeats.duplicates;
  found["conflicts"] = stats.repeats.conflicts;
  found["largest_difference"] = stats.repeats.largest_difference;
  found["writer"] = writer;
  py::list skipped;
  for (const std::string& log : stats.skipped) skipped.append(decoded(log));
  found["skipped"] = skipped;
  return found;
}

py::dict compact_table(const std::string& folder, const py::bytes& fingerprint) {
  const Fingerprint print = to_fingerprint(fingerprint);
  realign::Compaction done;
  {
    py::gil_scoped_release release;
    done = realign::compact_table(whole(folder, "folder"), print);
  }
  py::dict found;
  found["records"] = done.records;
  found["bytes_before"] = done.bytes_before;
  found["bytes_after"] = done.bytes_after;
  found["logs_merged"] = done.logs_merged;
  found["logs_in_use"] = done.logs_in_use;
  found["logs_skipped"] = done.logs_skipped;
  found["bad_dropped"] = done.bad_dropped;
  found["torn_bytes"] = done.torn_bytes;
  found["duplicates_dropped"] = done.duplicates_dropped;
  return found;
}

// OSError selects the subclass for the error number, such as PermissionError.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const realign::FileError& error) {
    const py::tuple arguments =
        py::make_tuple(error.code(), decoded(error.what()), decoded(error.path()));
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  } catch (const std::invalid_argument& error) {
    PyErr_SetObject(PyExc_ValueError, decoded(error.what()).ptr());
  }
}

}  // namespace

void bind_table(py::module_& module) {
  using released = py::call_guard<py::gil_scoped_release>;
  py::register_local_exception_translator(&translate);
  py::class_<Table>(module, "Table")
      .def(py::init([](const std::string& folder, const py::bytes& fingerprint,
                       const std::optional<py::str>& writer, bool read_only) {
             const Fingerprint print = to_fingerprint(fingerprint);
             const std::optional<std::string> name = name_of(writer);
             py::gil_scoped_release release;
             return std::make_unique<Table>(whole(folder, "folder"), print, name, read_only);
           }),
           py::arg("folder"), py::arg("fingerprint"), py::arg("writer") = py::none(),
           py::arg("read_only") = false)
      .def("lookup", &lookup, py::arg("keys"))
      .def("insert", &insert, py::arg("keys"), py::arg("logps"), py::arg("tokens"))
      .def("refresh", &Table::refresh, released())
      .def("sync", &Table::sync, released())
      .def("close", &Table::close, released())
      .def("stats", &stats)
      .def("__len__", &Table::size, released())
      .def_property_readonly("writer", py::cpp_function(&Table::writer, released()));
  module.def("compact_table", &compact_table, py::arg("folder"), py::arg("fingerprint"));
}
