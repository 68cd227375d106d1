// The collectives, each written once on operations and shown blocks.
#include <expar/collectives.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "src/util/check.h"
#include "src/util/processor.h"
#include "src/util/shown.h"

namespace expar {
namespace {

constexpr std::int64_t kFewElements = 1024;  // below, reading everything is cheaper than a second meeting

std::string sizes(std::int64_t got, std::int64_t wanted) {
  return std::to_string(got) + ", not " + std::to_string(wanted);
}

std::int64_t first_extent(const ConstTensor& tensor) { return tensor.shape().rank() == 0 ? 0 : tensor.size(0); }

/// Elements of one row of [M, N], also when M is 0.
std::int64_t extents_after_first(const ConstTensor& tensor) {
  std::int64_t elements = 1;
  for (int axis = 1; axis < tensor.shape().rank(); ++axis) elements *= tensor.size(axis);
  return elements;
}

std::span<const std::byte> bytes_of(const ConstTensor& tensor) { return {tensor.bytes(), tensor.byte_size()}; }

void copy_into(std::byte* to, std::span<const std::byte> from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size());
}

/// out [n] += rows [.., n], one row after the other.
void add_rows(std::span<const std::byte> rows, std::int64_t n, float* out) {
  const FloatMode mode;
  const auto* row = reinterpret_cast<const float*>(rows.data());
  const std::size_t row_bytes = at(n) * sizeof(float);
  for (std::size_t left = rows.size(); row_bytes > 0 && left >= row_bytes; left -= row_bytes, row += n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] += row[i];
  }
}

void require_sum(const ConstTensor& rows, const Tensor& out, std::int64_t elements) {
  if (rows.dtype() != DType::f32 || out.dtype() != DType::f32) refuse("sums are of f32");
  if (rows.shape().rank() != 2) refuse("rows have shape " + rows.shape().str() + ", not [M, N]");
  if (out.elements() != elements) refuse("out has " + sizes(out.elements(), elements) + " elements");
}

/// The sum of every rank's rows [M_r, N], read whole by every rank.
void sum_all(const Context& context, ConstTensor rows, Tensor out) {
  const std::int64_t n = extents_after_first(rows);
  share(
      context.communicator(), Signature("all_reduce").with("elements", n),
      [&](const Operation& operation, Block& block) {
        require_sum(rows, out, n);
        return show_copy(operation, block, bytes_of(rows));
      },
      [&](const Operation&, const Reading& reading) {
        std::fill_n(out.as<float>(), n, 0.0F);
        for (int p = 0; p < context.size(); ++p) add_rows(reading.from(p), n, out.as<float>());
      });
}

}  // namespace

void barrier(const Context& context) {
  const Phase phase(context.trace(), operation_span("barrier"));
  meet(context.communicator(), Signature("barrier"), [] { return Operation::Words{}; });
}

void broadcast(const Context& context, Tensor data, int root) {
  const Phase phase(context.trace(), operation_span("broadcast"));
  Signature signature("broadcast");
  signature.with("root", root).with("bytes", static_cast<std::int64_t>(data.byte_size()));
  Operation operation(context.communicator(), signature.with("dtype", static_cast<std::int64_t>(data.dtype())));
  const bool mine = context.rank() == root;
  Block block;
  operation.ready([&] {
    if (root < 0 || root >= context.size())
      refuse("root " + std::to_string(root) + " is not a rank below " + std::to_string(context.size()));
    return show_copy(operation, block, mine ? bytes_of(data) : std::span<const std::byte>{});
  });
  operation.meet();
  const auto if_so = [&](bool moves) { return ByteRange{0, moves ? data.byte_size() : 0}; };
  Reading reading(
      operation, block, [&](int peer) { return if_so(!mine && peer == root); }, [&](int) { return if_so(mine); });
  reading.finish();
  copy_into(data.bytes(), reading.from(root));
  operation.complete();
}

void all_gather(const Context& context, ConstTensor in, Tensor out) {
  const Phase phase(context.trace(), operation_span("all_gather"));
  Signature signature("all_gather");
  signature.with("dtype", static_cast<std::int64_t>(in.dtype())).with("row elements", extents_after_first(in));
  share(
      context.communicator(), signature,
      [&](const Operation& operation, Block& block) {
        if (in.dtype() != out.dtype())
          refuse("in is " + std::string(name(in.dtype())) + " and out is " + std::string(name(out.dtype())));
        if (in.shape().rank() == 0 || extents_after_first(in) != extents_after_first(out))
          refuse("in " + in.shape().str() + " and out " + out.shape().str() + " differ in more than the first axis");
        return show_copy(operation, block, bytes_of(in), at(in.size(0)), at(out.size(0)));
      },
      [&](Operation& operation, const Reading& reading) {
        std::uint64_t total = 0;
        for (int p = 0; p < context.size(); ++p) total += first_word(operation.words(p));
        for (int p = 0; p < context.size(); ++p) {  // every rank sees every rank's out: all throw the same
          const std::uint64_t rows = second_word(operation.words(p));
          if (rows == total) continue;
          operation.complete();
          context.communicator().throw_alike(
              Error(ErrorCode::bad_argument,
                    "out has " + std::to_string(rows) + ", not " + std::to_string(total) + " rows, the sum over ranks",
                    {.rank = p, .operation = "all_gather"}));
        }
        std::byte* to = out.bytes();
        for (int p = 0; p < context.size(); ++p) {
          const std::size_t row_bytes = at(extents_after_first(in)) * size_of(in.dtype());
          if (reading.from(p).size() != first_word(operation.words(p)) * row_bytes)
            context.communicator().blame(p, "all_gather", "showed other bytes than its rows have");
          copy_into(to, reading.from(p));
          to += reading.from(p).size();
        }
      });
}

Part part_of(std::int64_t elements, int rank, int ranks) {
  return {elements * rank / ranks, elements * (rank + 1) / ranks};
}

void reduce_scatter(const Context& context, ConstTensor rows, Tensor out) {
  const Phase phase(context.trace(), operation_span("reduce_scatter"));
  const std::int64_t n = extents_after_first(rows);
  const Part own = part_of(n, context.rank(), context.size());
  const std::int64_t own_n = own.end - own.begin;
  Operation operation(context.communicator(), Signature("reduce_scatter").with("elements", n));
  Block block;
  // The block holds, for each rank's part, this rank's rows of that part together: what a reader wants is one piece.
  operation.ready([&] {
    require_sum(rows, out, own_n);
    block = context.communicator().allocate(rows.byte_size());
    auto* to = reinterpret_cast<float*>(block.data());
    for (int p = 0; p < context.size(); ++p) {
      const Part part = part_of(n, p, context.size());
      for (std::int64_t r = 0; r < rows.size(0); ++r) {
        to = std::copy(rows.as<float>() + r * n + part.begin, rows.as<float>() + r * n + part.end, to);
      }
    }
    return operation.show(block, at(rows.size(0)));
  });
  operation.meet();
  const auto range = [&](int holder, const Part& part) {
    const std::size_t unit = first_word(operation.words(holder)) * sizeof(float);
    return ByteRange{at(part.begin) * unit, at(part.end - part.begin) * unit};
  };
  Reading reading(
      operation, block, [&](int peer) { return range(peer, own); },
      [&](int peer) { return range(context.rank(), part_of(n, peer, context.size())); });
  reading.finish();
  std::fill_n(out.as<float>(), own_n, 0.0F);
  for (int p = 0; p < context.size(); ++p) add_rows(reading.from(p), own_n, out.as<float>());
  operation.complete();
}

void all_reduce(const Context& context, ConstTensor rows, Tensor out) {
  const Phase phase(context.trace(), operation_span("all_reduce"));
  const std::int64_t n = extents_after_first(rows);
  if (n <= kFewElements || context.size() == 1 || rows.dtype() != DType::f32 || out.dtype() != DType::f32 ||
      out.elements() != n) {
    return sum_all(context, rows, out);  // which also refuses what is wrong
  }
  const Part own = part_of(n, context.rank(), context.size());
  const Tensor part(out.as<float>() + own.begin, Shape{own.end - own.begin});
  reduce_scatter(context, rows, part);
  all_gather(context, part, Tensor(out.as<float>(), Shape{n}));
}

void all_to_all_v(const Context& context, ConstTensor in, std::span<const std::int64_t> send_rows, Tensor out,
                  std::span<const std::int64_t> receive_rows) {
  const Phase phase(context.trace(), operation_span("all_to_all_v"));
  const auto& communicator = context.communicator();
  const auto ranks = static_cast<std::size_t>(context.size());
  const auto self = static_cast<std::size_t>(context.rank());
  const std::size_t row_bytes = static_cast<std::size_t>(extents_after_first(in)) * size_of(in.dtype());
  const std::size_t table = ranks * sizeof(std::int64_t);  // in front of the rows: how many go to each rank
  Signature signature("all_to_all_v");
  signature.with("dtype", static_cast<std::int64_t>(in.dtype())).with("row elements", extents_after_first(in));
  Operation operation(communicator, signature);
  Block block;
  operation.ready([&] {
    if (send_rows.size() != ranks || receive_rows.size() != ranks)
      refuse("the counts of rows do not have one entry per rank");
    if (in.dtype() != out.dtype() || extents_after_first(in) != extents_after_first(out))
      refuse("in and out differ in dtype or row");
    std::int64_t sent = 0, received = 0;
    for (std::size_t p = 0; p < ranks; ++p) {
      if (send_rows[p] < 0 || receive_rows[p] < 0)
        refuse("a count of rows for rank " + std::to_string(p) + " is negative");
      sent += send_rows[p];
      received += receive_rows[p];
    }
    if (sent != first_extent(in)) refuse("in has " + sizes(first_extent(in), sent) + " rows, the sum of send_rows");
    if (received != first_extent(out))
      refuse("out has " + sizes(first_extent(out), received) + " rows, the sum of receive_rows");
    block = communicator.allocate(table + in.byte_size());
    std::memcpy(block.data(), send_rows.data(), table);
    copy_into(block.data() + table, bytes_of(in));
    return operation.show(block);
  });
  operation.meet();

  // First everybody's table, so that a disagreement is found by both ends before rows move.
  const auto whole_table = [&](int) { return ByteRange{0, table}; };
  Reading counts(operation, block, whole_table, whole_table);
  counts.finish();
  const auto rows_from_to = [&](std::size_t from, std::size_t to) {
    std::int64_t rows = 0;
    std::memcpy(&rows, counts.from(static_cast<int>(from)).data() + to * sizeof rows, sizeof rows);
    return rows;
  };
  std::vector<ByteRange> wants(ranks), gives(ranks);
  std::size_t given = table;
  for (std::size_t p = 0; p < ranks; ++p) {
    if (rows_from_to(p, self) != receive_rows[p]) {
      communicator.blame(static_cast<int>(p), "all_to_all_v",
                         "sends " + std::to_string(rows_from_to(p, self)) + " rows, rank " +
                             std::to_string(communicator.job_rank(context.rank())) + " expects " +
                             std::to_string(receive_rows[p]),
                         ErrorCode::mismatch);
    }
    std::size_t before = table;
    for (std::size_t q = 0; q < self; ++q) before += static_cast<std::size_t>(rows_from_to(p, q)) * row_bytes;
    wants[p] = {before, static_cast<std::size_t>(receive_rows[p]) * row_bytes};
    gives[p] = {given, static_cast<std::size_t>(send_rows[p]) * row_bytes};
    given += gives[p].bytes;
  }
  Reading reading(
      operation, block, [&](int peer) { return wants[at(peer)]; }, [&](int peer) { return gives[at(peer)]; });
  reading.finish();
  std::byte* to = out.bytes();
  for (std::size_t p = 0; p < ranks; ++p) {
    copy_into(to, reading.from(static_cast<int>(p)));
    to += wants[p].bytes;
  }
  operation.complete();
}

}  // namespace expar
