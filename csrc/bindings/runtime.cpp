// SPDX-License-Identifier: Apache-2.0
// The stateful runtime as Python classes. Tables cross as numpy int64 arrays; addresses and streams as int. Whatever
// may block, copy or take a lock that a copying thread holds runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <span>
#include <string>
#include <utility>

#include "common/error.h"
#include "common/nvtx.h"
#include "runtime/copy_engine.h"
#include "runtime/host_pool.h"
#include "runtime/memory_ledger.h"
#include "runtime/reservation_ring.h"
#include "runtime/ring_allocator.h"
#include "runtime/scheduler.h"
#include "runtime/staging_ring.h"

namespace py = pybind11;

namespace vericache::bindings {

void bind_runtime(py::module_& m);  // called by module.cpp

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

CopyDirection direction_of(const std::string& name) {
  for (int i = 0; i < kCopyDirections; ++i) {
    if (name == name_of(static_cast<CopyDirection>(i))) return static_cast<CopyDirection>(i);
  }
  throw Error(detail::concat("unknown copy direction '", name, "'; use h2d, d2h or d2d"));
}

// The rows of a [n, 3] int64 table, in place: CopyRow is three int64 in the table's order.
std::span<const CopyRow> rows_of(const py::array& table) {
  static_assert(sizeof(CopyRow) == 3 * sizeof(int64_t));
  VC_CHECK(table.dtype().equal(py::dtype::of<int64_t>()), "a copy table must be int64, not ",
           std::string(py::str(table.dtype())));
  VC_CHECK(table.ndim() == 2 && table.shape(1) == 3, "a copy table must have shape [n, 3] (src, dst, bytes), not ",
           std::string(py::str(table.attr("shape"))));
  VC_CHECK((table.flags() & py::array::c_style) != 0, "a copy table must be C-contiguous; use np.ascontiguousarray");
  return {static_cast<const CopyRow*>(table.data()), static_cast<size_t>(table.shape(0))};
}

py::array_t<uint8_t> view(const py::object& self, int64_t address, int64_t bytes) {
  const auto& pool = self.cast<const HostPool&>();
  const int64_t allocated = pool.allocated_bytes(address);
  VC_CHECK(0 <= bytes && bytes <= allocated, "a view of ", bytes, " bytes does not fit the allocation of ", allocated,
           " bytes at address ", address);
  return py::array_t<uint8_t>(bytes, reinterpret_cast<const uint8_t*>(address), self);
}

py::tuple as_tuple(const LayerRange& range) { return py::make_tuple(range.id, range.layer_lo, range.layer_hi); }

void bind_host_pool(py::module_& m) {
  py::class_<HostPoolStats>(m, "HostPoolStats", "Bytes and counts of a HostPool at one moment.")
      .def_readonly("capacity", &HostPoolStats::capacity)
      .def_readonly("bytes_reserved", &HostPoolStats::bytes_reserved)
      .def_readonly("bytes_in_use", &HostPoolStats::bytes_in_use)
      .def_readonly("peak_in_use", &HostPoolStats::peak_in_use)
      .def_readonly("largest_free", &HostPoolStats::largest_free)
      .def_readonly("blocks", &HostPoolStats::blocks)
      .def_readonly("allocations", &HostPoolStats::allocations)
      .def_readonly("pinned", &HostPoolStats::pinned);
  py::class_<HostPool>(m, "HostPool",
                       "Page-aligned host memory in contiguous extents, taken from the system a block at a time.")
      .def(py::init<int64_t, int64_t, int>(), py::kw_only(), py::arg("capacity") = 0,
           py::arg("block_bytes") = int64_t{64} << 20, py::arg("device") = -1,
           "capacity: bytes it may take (0: default_host_capacity()); block_bytes: bytes of one growth step; device: "
           "CUDA ordinal, for whose copies blocks are pinned, or -1.")
      .def("allocate", &HostPool::allocate, py::arg("bytes"), NoGil(),
           "Address of `bytes` contiguous bytes, 4096-aligned, contents arbitrary. Raises CapacityError with the "
           "arithmetic.")
      .def("free", &HostPool::free, py::arg("address"), NoGil(), "Give an allocation back.")
      .def("allocated_bytes", &HostPool::allocated_bytes, py::arg("address"),
           "Bytes of the live allocation at `address`, rounded up to 4096.")
      .def("reserve", &HostPool::reserve, py::arg("bytes"), NoGil(),
           "Grow until an allocation of `bytes` needs no growth (pinning is slow: do it ahead, from any thread).")
      .def("trim", &HostPool::trim, NoGil(), "Give blocks without allocations back to the system; returns the bytes.")
      .def("view", &view, py::arg("address"), py::arg("bytes"),
           "numpy uint8 array over the first `bytes` of an allocation; keeps the pool alive, not the allocation.")
      .def("stats", &HostPool::stats, "A HostPoolStats.");
  m.def("default_host_capacity", &default_host_capacity, py::arg("root") = "",
        "0.8 of the tightest cgroup memory limit or of the available memory, in bytes. root: prefix of /proc and "
        "/sys, for tests.");
}

void bind_rings(py::module_& m) {
  py::class_<RingAllocator>(m, "RingAllocator", "The placement logic of StagingRing alone: offsets, no memory.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def("acquire", &RingAllocator::acquire, py::arg("bytes"), "Slot id, or -1 if it does not fit now.")
      .def(
          "release",
          [](RingAllocator& ring, int64_t id) {
            std::vector<int64_t> ids;
            for (const RingSlot& slot : ring.release(id)) ids.push_back(slot.id);
            return ids;
          },
          py::arg("slot"), "Release a slot; returns the slots whose space became free by this, oldest first.")
      .def(
          "offset", [](const RingAllocator& ring, int64_t id) { return ring.slot(id).offset; }, py::arg("slot"))
      .def(
          "bytes", [](const RingAllocator& ring, int64_t id) { return ring.slot(id).bytes; }, py::arg("slot"))
      .def("fits", &RingAllocator::fits, py::arg("bytes"))
      .def_property_readonly("capacity", &RingAllocator::capacity)
      .def_property_readonly("live_slots", &RingAllocator::live_slots)
      .def_property_readonly("occupied", &RingAllocator::occupied);

  py::class_<StagingRingStats>(m, "StagingRingStats", "Bytes and counts of a StagingRing at one moment.")
      .def_readonly("capacity", &StagingRingStats::capacity)
      .def_readonly("occupied", &StagingRingStats::occupied)
      .def_readonly("peak_occupied", &StagingRingStats::peak_occupied)
      .def_readonly("live_slots", &StagingRingStats::live_slots)
      .def_readonly("acquired", &StagingRingStats::acquired)
      .def_readonly("refused", &StagingRingStats::refused);
  py::class_<StagingRing>(m, "StagingRing", "A FIFO ring of staging slots in a device buffer that the caller owns.")
      .def(py::init<int64_t, int64_t, int>(), py::arg("base"), py::arg("bytes"), py::arg("device") = -1,
           "base: the buffer's address, 256-aligned; bytes: its size; device: CUDA ordinal, -1 for the CPU.")
      .def("acquire", &StagingRing::acquire, py::arg("bytes"), NoGil(),
           "Id of a contiguous 256-aligned slot, or -1 if there is no room now. Raises CapacityError if it could "
           "never fit.")
      .def("fits", &StagingRing::fits, py::arg("bytes"), NoGil(), "Whether acquire would succeed now.")
      .def("address", &StagingRing::address, py::arg("slot"), NoGil(), "Address of a live slot.")
      .def("bytes", &StagingRing::bytes, py::arg("slot"), NoGil(), "Bytes of a live slot, rounded up to 256.")
      .def("ready", &StagingRing::ready, py::arg("slot"), NoGil(),
           "Whether the slot's latest copy has arrived; raises if it failed. Never blocks.")
      .def("wait_on_stream", &StagingRing::wait_on_stream, py::arg("slot"), py::arg("stream"), NoGil(),
           "Later work of the CUDA stream waits for the slot's copy; on the CPU the caller does.")
      .def("release", &StagingRing::release, py::arg("slot"), py::arg("stream") = 0, NoGil(),
           "The work now in `stream` holds the last reads of the slot. Any order; also while its copy is under way.")
      .def_property_readonly("device", &StagingRing::device)
      .def_property_readonly("capacity", &StagingRing::capacity)
      .def("stats", &StagingRing::stats, NoGil(), "A StagingRingStats.");
}

void bind_copy_engine(py::module_& m) {
  py::class_<CopyEngineOptions>(m, "CopyEngineOptions",
                                "Hooks of the copy engine for tests and measurements; the defaults switch all off.")
      .def(py::init([](int64_t delay_us_min, int64_t delay_us_max, uint64_t seed, double bandwidth_bytes_per_s,
                       int64_t fail_after, bool timing) {
             return CopyEngineOptions{delay_us_min, delay_us_max, seed, bandwidth_bytes_per_s, fail_after, timing};
           }),
           py::kw_only(), py::arg("delay_us_min") = 0, py::arg("delay_us_max") = 0, py::arg("seed") = 0,
           py::arg("bandwidth_bytes_per_s") = 0.0, py::arg("fail_after") = -1, py::arg("timing") = false,
           "delay_us_*: each copy sleeps a random time before it moves a byte (seeded; CPU). bandwidth_bytes_per_s: "
           "emulates a link per direction by sleeping (0: none; CPU). fail_after: that many copies run, the next one "
           "fails (-1: none). timing: measure busy_seconds on CUDA.")
      .def_readonly("delay_us_min", &CopyEngineOptions::delay_us_min)
      .def_readonly("delay_us_max", &CopyEngineOptions::delay_us_max)
      .def_readonly("seed", &CopyEngineOptions::seed)
      .def_readonly("bandwidth_bytes_per_s", &CopyEngineOptions::bandwidth_bytes_per_s)
      .def_readonly("fail_after", &CopyEngineOptions::fail_after)
      .def_readonly("timing", &CopyEngineOptions::timing);
  py::class_<CopyCounters>(m, "CopyCounters", "What one direction of a CopyEngine has moved.")
      .def_readonly("bytes", &CopyCounters::bytes)
      .def_readonly("rows", &CopyCounters::rows)
      .def_readonly("copies", &CopyCounters::copies)
      .def_readonly("jobs", &CopyCounters::jobs)
      .def_readonly("failed", &CopyCounters::failed)
      .def_readonly("in_flight_jobs", &CopyCounters::in_flight_jobs)
      .def_readonly("in_flight_bytes", &CopyCounters::in_flight_bytes)
      .def_readonly("busy_seconds", &CopyCounters::busy_seconds);
  py::class_<CopyEngine>(m, "CopyEngine", "Moves bytes between host and device beside compute.")
      .def(py::init([](int device, const std::optional<CopyEngineOptions>& options) {
             return std::make_unique<CopyEngine>(device, options.value_or(CopyEngineOptions{}));
           }),
           py::arg("device") = -1, py::arg("options") = py::none(),
           "device: CUDA ordinal, -1 for the CPU backend (a thread a direction).")
      .def(
          "submit",
          [](CopyEngine& engine, const py::array& table, const std::string& direction, StagingRing* ring, int64_t slot,
             std::optional<int64_t> after_stream, int64_t after) {
            const std::span<const CopyRow> rows = rows_of(table);
            const CopySubmit how{.direction = direction_of(direction),
                                 .ring = ring,
                                 .slot = slot,
                                 .after_stream = after_stream.value_or(0),
                                 .has_after_stream = after_stream.has_value(),
                                 .after = after};
            py::gil_scoped_release release;
            return engine.submit(rows, how);
          },
          py::arg("table"), py::arg("direction"), py::kw_only(), py::arg("ring") = py::none(), py::arg("slot") = -1,
          py::arg("after_stream") = py::none(), py::arg("after") = -1,
          "table: int64 [n, 3] of (src, dst, bytes), read before this returns. direction: h2d, d2h or d2d. ring, "
          "slot: the staging slot it fills. after_stream: CUDA stream whose present work the copy follows. after: a "
          "ticket that the copy follows. Returns the ticket.")
      .def("ready", &CopyEngine::ready, py::arg("ticket"), NoGil(),
           "Whether the copy is through; never blocks. Raises KernelError, every time, if it failed.")
      .def("wait", &CopyEngine::wait, py::arg("ticket"), NoGil(), "Block until the copy is through; raises as ready.")
      .def("wait_on_stream", &CopyEngine::wait_on_stream, py::arg("ticket"), py::arg("stream"), NoGil(),
           "Later work of the CUDA stream waits for the copy; on the CPU the caller does.")
      .def("completed", &CopyEngine::completed, NoGil(), "Copies through so far, failed ones too.")
      .def("wait_until", &CopyEngine::wait_until, py::arg("count"), py::arg("seconds") = -1.0, NoGil(),
           "Block until completed() >= count, nothing is in flight or the time is up (-1: no limit); returns "
           "completed().")
      .def(
          "wait_any",
          [](CopyEngine& engine, int64_t seen, double seconds) { return engine.wait_until(seen + 1, seconds); },
          py::arg("seen"), py::arg("seconds") = -1.0, NoGil(),
          "Block until completed() > seen, where seen is what completed() was before the tickets were looked at; "
          "returns as wait_until.")
      .def(
          "counters",
          [](CopyEngine& engine, const std::string& direction) {
            const CopyDirection which = direction_of(direction);
            py::gil_scoped_release release;
            return engine.counters(which);
          },
          py::arg("direction"), "The CopyCounters of h2d, d2h or d2d.")
      .def("shutdown", &CopyEngine::shutdown, py::arg("drain") = true, NoGil(),
           "Finish (drain) or fail what has not begun; afterwards no byte moves and submit raises.")
      .def_property_readonly("device", &CopyEngine::device);
}

void bind_accounting(py::module_& m) {
  py::class_<ReservationRing>(m, "ReservationRing", "A resource with a capacity per iteration, reserved ahead.")
      .def(py::init<int64_t, int64_t>(), py::arg("capacity"), py::arg("horizon"))
      .def("earliest_fit", &ReservationRing::earliest_fit, py::arg("amount"), py::arg("max_per_iter") = 0,
           py::arg("not_before") = 0,
           "Iteration by whose end `amount` would be through, spread over iterations; -1 beyond the horizon.")
      .def("reserve", &ReservationRing::reserve, py::arg("owner"), py::arg("amount"), py::arg("max_per_iter") = 0,
           py::arg("not_before") = 0, "Reserve what earliest_fit counted; returns its answer.")
      .def("earliest_span", &ReservationRing::earliest_span, py::arg("amount"), py::arg("length"),
           py::arg("not_before") = 0, "First of `length` iterations that each have `amount` free; -1: none.")
      .def("reserve_span", &ReservationRing::reserve_span, py::arg("owner"), py::arg("amount"), py::arg("first"),
           py::arg("length"), "Reserve `amount` in each of `length` iterations from `first`; False if it does not fit.")
      .def("release", &ReservationRing::release, py::arg("owner"), "Give back from now on; returns the amount.")
      .def("advance", &ReservationRing::advance, py::arg("iterations") = 1)
      .def("free_at", &ReservationRing::free_at, py::arg("iteration"))
      .def_property_readonly("now", &ReservationRing::now)
      .def_property_readonly("capacity", &ReservationRing::capacity)
      .def_property_readonly("horizon", &ReservationRing::horizon)
      .def_property_readonly("reserved", &ReservationRing::reserved);

  py::class_<MemoryLedger> ledger(m, "MemoryLedger", "Who holds how much of a memory budget, and for what.");
  ledger.def(py::init<int64_t>(), py::arg("budget"))
      .def("try_reserve", &MemoryLedger::try_reserve, py::arg("owner"), py::arg("kind"), py::arg("bytes"),
           "Add bytes to what the owner holds; False, changing nothing, beyond the budget. Negative owners are "
           "permanent.")
      .def("try_resize", &MemoryLedger::try_resize, py::arg("owner"), py::arg("kind"), py::arg("bytes"),
           "Set what the owner holds of this kind; False if it would grow beyond the budget.")
      .def("release", &MemoryLedger::release, py::arg("owner"), "Give all the owner holds back; returns the bytes.")
      .def("used", &MemoryLedger::used)
      .def("free", &MemoryLedger::free)
      .def("peak", &MemoryLedger::peak)
      .def("held", &MemoryLedger::held, py::arg("owner"))
      .def("used_by_kind", &MemoryLedger::used_by_kind)
      .def("would_ever_fit", &MemoryLedger::would_ever_fit, py::arg("bytes"),
           "Whether bytes would fit beside the permanent owners alone.")
      .def("describe", &MemoryLedger::describe, py::arg("kind") = "", py::arg("bytes") = 0,
           py::arg("permanent_only") = false,
           "The arithmetic as one sentence, with a further need of `bytes` for `kind` as the last term.")
      .def_property_readonly("budget", &MemoryLedger::budget);
  ledger.attr("PERMANENT") = MemoryLedger::kPermanent;
  m.def("format_bytes", &format_bytes, py::arg("bytes"), "As people read it: 23.1 MiB.");
}

void bind_scheduler(py::module_& m) {
  py::class_<Scheduler>(m, "Scheduler",
                        "Which layer of which verifying request is fetched next, and which layers may run.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("max_verifying"), py::arg("link_bytes_per_iteration") = 0,
           py::arg("horizon") = 256)
      .def("reserve_verify", &Scheduler::reserve_verify, py::arg("id"), py::arg("bytes"), py::arg("not_before"),
           py::arg("max_per_iter") = 0,
           "Reserve the link for a verify; returns the iteration by whose end it is fetched, -1: do not admit.")
      .def("begin_iteration", &Scheduler::begin_iteration, "Once an iteration, before its fetches.")
      .def("enqueue", &Scheduler::enqueue, py::arg("id"), py::arg("layer_bytes"), py::arg("priority") = 0,
           "A verify joins; layer_bytes: bytes each layer has to fetch (0: none).")
      .def(
          "next",
          [](const Scheduler& scheduler) -> py::object {
            const auto fetch = scheduler.next();
            if (!fetch) return py::none();
            return py::make_tuple(fetch->id, fetch->layer);
          },
          "(id, layer) to fetch next, or None. Asking changes nothing.")
      .def("submitted", &Scheduler::submitted, py::arg("id"), py::arg("layer"))
      .def("arrived", &Scheduler::arrived, py::arg("id"), py::arg("layer"))
      .def(
          "runnable",
          [](const Scheduler& scheduler, int64_t max_layers) {
            py::list ranges;
            for (const LayerRange& range : scheduler.runnable(max_layers)) ranges.append(as_tuple(range));
            return ranges;
          },
          py::arg("max_layers") = 0, "[(id, layer_lo, layer_hi)] that have arrived and not run, oldest verify first.")
      .def("ran", &Scheduler::ran, py::arg("id"), py::arg("layer_hi"),
           "Layers below layer_hi have run; True if the verify is done by this.")
      .def("cancel", &Scheduler::cancel, py::arg("id"),
           "Forget a verify; returns the layers submitted and not run, whose slots the caller releases.")
      .def("done", &Scheduler::done, py::arg("id"), "Whether the id is neither waiting nor verifying.")
      .def_property_readonly("iteration", &Scheduler::iteration)
      .def_property_readonly("link_reserved", &Scheduler::link_reserved)
      .def_property_readonly("waiting", &Scheduler::waiting)
      .def_property_readonly("verifying", &Scheduler::verifying);
}

}  // namespace

void bind_runtime(py::module_& m) {
  bind_host_pool(m);
  bind_rings(m);
  bind_copy_engine(m);
  bind_accounting(m);
  bind_scheduler(m);
  m.def("nvtx_push", &nvtx_push, py::arg("name"), "Open a profiler range; costs nothing without CUDA.");
  m.def("nvtx_pop", &nvtx_pop, "Close the innermost profiler range.");
}

}  // namespace vericache::bindings
