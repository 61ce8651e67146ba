//! The allocator of an instance that handles one message: it hands memory out and never takes it back.
//!
//! An instance lives for one message, and all its memory goes with it. Whatever is freed before that is work for
//! nothing, and so is any book-keeping that would allow it. What is left is an addition and a comparison for each
//! allocation. The exception is the newest block, which may grow, shrink and go in place: that is what a growing
//! string or vector does all the time.
//!
//! The heap begins where the linker left off and first uses what the memory has anyway, see `--initial-memory` in
//! the build flags. An ordinary mail fits there, and the host is spared a `memory.grow`, which costs it system calls.
//! Beyond that the memory grows until the limit that the host sets, then allocations fail.
//!
//! In an instance that is used for many messages this allocator would run out of memory.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::wasm32::{memory_grow, memory_size};
use core::cell::Cell;
use core::ptr;

const PAGE_BYTES: usize = 64 * 1024;
/// The memory grows by at least this much, for its price does not depend on the size.
const GROWTH_MIN_PAGES: usize = 16;

#[global_allocator]
static BUMP: Bump = Bump { next: Cell::new(0), end: Cell::new(0) };

/// Hands out the memory between `next` and `end`; both are 0 before the first allocation.
struct Bump {
    next: Cell<usize>,
    end: Cell<usize>,
}

// SAFETY: the module is built without threads, so nobody else can reach the cells while they are in use.
unsafe impl Sync for Bump {}

impl Bump {
    /// Moves `end` so that a block may end at `block_end`; false if there is no more memory.
    #[cold]
    #[inline(never)]
    fn grow(&self, block_end: usize) -> bool {
        let end = memory_end();
        if end < block_end {
            let pages = (block_end - end).div_ceil(PAGE_BYTES);
            // A little more than needed, but rather exactly that than nothing.
            let granted = memory_grow(0, pages.max(GROWTH_MIN_PAGES)) != usize::MAX
                || pages < GROWTH_MIN_PAGES && memory_grow(0, pages) != usize::MAX;
            if !granted {
                return false;
            }
        }
        self.end.set(memory_end());
        true
    }

    /// The first address behind the program's own data.
    fn heap_base() -> usize {
        // SAFETY: the linker defines it, for every program, and only its address is taken.
        unsafe extern "C" {
            static __heap_base: u8;
        }
        (&raw const __heap_base).addr()
    }

    /// Whether this is the newest block, with nothing handed out behind it.
    fn is_newest(&self, block: *mut u8, size: usize) -> bool {
        block.addr() + size == self.next.get()
    }
}

/// Where the memory ends; of a memory of 4 GiB the last page is left out, since its end is no address.
fn memory_end() -> usize {
    memory_size(0).min(usize::MAX / PAGE_BYTES) * PAGE_BYTES
}

// SAFETY: a block is only handed out between `next` and `end`, both of which lie in the memory behind the program's
// own data, and `next` moves past it; it moves back only to the start of a block that is freed, or to the new end
// of one that shrinks. So no two living blocks overlap. Nothing here panics or allocates.
unsafe impl GlobalAlloc for Bump {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if self.next.get() == 0 {
            self.next.set(Self::heap_base());
        }
        // Alignments are powers of two; sizes are at most isize::MAX, and addresses in use are far below the rest.
        let Some(aligned) = self.next.get().checked_add(layout.align() - 1) else { return ptr::null_mut() };
        let start = aligned & !(layout.align() - 1);
        let Some(block_end) = start.checked_add(layout.size()) else { return ptr::null_mut() };
        if block_end > self.end.get() && !self.grow(block_end) {
            return ptr::null_mut();
        }
        self.next.set(block_end);
        ptr::with_exposed_provenance_mut(start)
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if self.is_newest(block, layout.size()) {
            self.next.set(block.addr());
        }
    }

    /// Zeroes the block: where a freed block was before, memory is not fresh any more.
    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises about `layout` are those that `alloc` asks for.
        let block = unsafe { self.alloc(layout) };
        if !block.is_null() {
            // SAFETY: `alloc` just handed out this many bytes.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if self.is_newest(block, layout.size()) {
            let Some(block_end) = block.addr().checked_add(new_size) else { return ptr::null_mut() };
            if block_end > self.end.get() && !self.grow(block_end) {
                return ptr::null_mut();
            }
            self.next.set(block_end);
            return block;
        }
        if new_size <= layout.size() {
            return block;
        }
        // SAFETY: the alignment is that of an existing layout, and the caller promises that `new_size`, rounded up
        // to it, does not exceed isize::MAX.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: the caller promises that `new_size` is not zero.
        let new_block = unsafe { self.alloc(new_layout) };
        if !new_block.is_null() {
            // SAFETY: the old block has `layout.size()` bytes, the new one more, and new blocks overlap no others.
            unsafe { ptr::copy_nonoverlapping(block, new_block, layout.size()) };
        }
        new_block
    }
}
