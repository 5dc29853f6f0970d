// CUTLASS's persistent, warp-specialized GEMM for sm_90a, with this epilogue visitor tree:
//   accumulator, shift, label -> MaskedExp -> sum over columns -> bf16 -> sum over columns ->
//   exp_logits
#include "gemm/exp_head.h"

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <stdexcept>
#include <string>

#include "cuda_device.h"
#include "gemm/masked_exp.h"

namespace realign {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// A node of the tree: exp2(scale * z - shift), or 0 in the label's column.
struct MaskedExp {
  struct SharedStorage {};
  struct Arguments {
    float scale;
  };
  using Params = Arguments;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE MaskedExp() {}
  CUTLASS_HOST_DEVICE MaskedExp(const Params& params, const SharedStorage&) : params(params) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::ProducerLoadArgs<Args...>&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Coordinates& coordinates, int first_column, float scale)
        : coordinates(coordinates), first_column(first_column), scale(scale) {}

    template <class Accumulator, int Size>
    CUTLASS_DEVICE cutlass::Array<float, Size> visit(const cutlass::Array<Accumulator, Size>&,
                                                     int epi_v,
                                                     int epi_m,
                                                     int epi_n,
                                                     const cutlass::Array<float, Size>& z,
                                                     const cutlass::Array<float, Size>& shift,
                                                     const cutlass::Array<int, Size>& label) {
      const auto at = coordinates(_, _, _, epi_m, epi_n);
      cutlass::Array<float, Size> e;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Size; ++i) {
        const int column = first_column + static_cast<int>(get<1>(at(epi_v * Size + i)));
        e[i] = masked_exp2(z[i], scale, shift[i], column == label[i]);
      }
      return e;
    }

    Coordinates coordinates;  // this thread's elements in the tile
    int first_column;         // first column of the tile
    float scale;
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    // The residue is the problem size minus the position of this thread's first element.
    const int first = static_cast<int>(get<1>(args.problem_shape_mnkl)) -
                      static_cast<int>(get<1>(args.residue_tCcD));
    return Callbacks<decltype(args.tCcD)>(args.tCcD, first, params.scale);
  }

  Params params;
};

using Half = cutlass::bfloat16_t;
using Tile = Shape<Int<kExpHeadRows>, Int<kExpHeadColumns>, _64>;
using Cluster = Shape<_2, _1, _1>;
using ByRow = Stride<_1, _0, int>;
constexpr int kAlignment = 8;  // 16 bytes

using Shift = fusion::Sm90ColBroadcast<0, Tile, float, float, ByRow>;
using Label = fusion::Sm90ColBroadcast<0, Tile, int, int, ByRow>;
using Exp = fusion::Sm90EVT<MaskedExp, fusion::Sm90AccFetch, Shift, Label>;
// One sum for each row and tile of columns, in a fixed order, without atomics or a final reduction.
using Sum = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float,
                                     float, cutlass::FloatRoundStyle::round_to_nearest, ByRow, 4,
                                     false, false>;
using Round = fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Half, float,
                                  cutlass::FloatRoundStyle::round_to_nearest>;
using Tree = fusion::Sm90EVT<Sum, fusion::Sm90EVT<Round, fusion::Sm90EVT<Sum, Exp>>>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
    kAlignment, Half, cutlass::layout::RowMajor, kAlignment,
    cutlass::epilogue::TmaWarpSpecializedCooperative, Tree>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Half, cutlass::layout::RowMajor,
    kAlignment, Half, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

void check(cutlass::Status status, const char* step) {
  if (status == cutlass::Status::kSuccess) return;
  cudaGetLastError();  // clears the error, so that the next launch does not report it
  throw std::runtime_error(std::string("exp_head: ") + step + ": " +
                           cutlass::cutlassGetStatusString(status));
}

}  // namespace

void exp_head(const ExpHead& head, int device, void* stream) {
  const CurrentDevice current(device);
  constexpr float kLog2E = 1.44269504f;
  const ByRow by_row{_1{}, _0{}, 0};
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {head.rows, head.vocabulary, head.width, 1},
      {static_cast<const Half*>(head.hidden),
       {head.hidden_stride, _1{}, 0},
       static_cast<const Half*>(head.weight),
       {head.weight_stride, _1{}, 0}},
      {{{{{{}, {head.shift, 0.0f, by_row}, {head.labels, 0, by_row}, {kLog2E}},
          {head.sums, 0.0f, by_row}},
         {}},
        {head.rounded_sums, 0.0f, by_row}},
       nullptr,
       {},
       static_cast<Half*>(head.exp_logits),
       {head.exp_logits_stride, _1{}, 0}}};
  Gemm gemm;
  check(Gemm::can_implement(arguments), "shape, stride or address");
  if (Gemm::get_workspace_size(arguments) != 0) {
    throw std::runtime_error("exp_head: CUTLASS requires a workspace");
  }
  const auto on = static_cast<cudaStream_t>(stream);
  check(gemm.initialize(arguments, nullptr, on), "initialize");
  check(gemm.run(on), "launch");
}

}  // namespace realign
