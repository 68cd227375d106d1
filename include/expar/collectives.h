// Collectives over a context's ranks: all call them, in the same order.
//
// What each throws besides, all do: mismatch (ranks run different operations), timeout, peer_lost, no_memory. Errors
// come before rows move, the same on every rank, and leave the communicator usable, but where it says otherwise.
// Sums run in (rank, row) order, so that equal rows give equal bits however many ranks hold them.
#pragma once

#include <cstdint>
#include <span>

#include <expar/context.h>

namespace expar {

/// Returns after every rank has entered. Cost: one meeting.
void barrier(const Context& context);

/// `data` [..] of `root` replaces that of every other rank.
/// Throws Error: bad_argument (`root` is no rank), mismatch (ranks name another root, size or dtype).
/// Cost: one copy of the data per rank.
void broadcast(const Context& context, Tensor data, int root);

/// Concatenates all ranks' `in` [n_r, ...] along the first axis into `out` [sum of n_r, ...]; n_r may differ and be 0.
/// Throws Error: bad_argument (out has another dtype, row or number of rows), mismatch (ranks have other dtypes or
/// rows). Cost: each rank reads every other rank's part once.
void all_gather(const Context& context, ConstTensor in, Tensor out);

/// out [N] = the sum over all ranks' rows [M_r, N], in (rank, row) order, in f32; M_r may differ and be 0. dtype f32.
/// Each element is summed by one rank and then read by all.
/// Throws Error: bad_argument (not f32; rows that are not [M, N]; out of another size), mismatch (ranks have other N).
/// Cost: 2 reads of N elements and one of each row's share per rank, whatever P; one meeting for few elements, else
/// two.
void all_reduce(const Context& context, ConstTensor rows, Tensor out);

/// Elements [begin, end) of `elements`, as reduce_scatter and all_reduce share them out.
struct Part {
  std::int64_t begin = 0, end = 0;
};
Part part_of(std::int64_t elements, int rank, int ranks);

/// As all_reduce, but each rank keeps its part: out [part_of(N, rank, P)].
/// Cost: one copy of this rank's rows and one read of its share of everyone's; one meeting.
void reduce_scatter(const Context& context, ConstTensor rows, Tensor out);

/// Rows of `in` [sum of send_rows, ...], destination by destination, arrive in `out` [sum of receive_rows, ...],
/// source by source. Both counts have P entries; zero is fine.
/// Throws Error: bad_argument (counts that are not P, negative or not the rows of in and out; in and out of other
/// dtypes or rows), mismatch (ranks have other dtypes or rows; or two ends see a count differently, which ends the
/// job). Cost: one copy of each row on each side.
void all_to_all_v(const Context& context, ConstTensor in, std::span<const std::int64_t> send_rows, Tensor out,
                  std::span<const std::int64_t> receive_rows);

}  // namespace expar
