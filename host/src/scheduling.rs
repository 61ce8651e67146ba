//! What the kernel is told about threads that are not like the others, and what it says of them. Nothing here needs a
//! privilege.

use rustix::process::getpriority_process;
use rustix::time::{ClockId, clock_gettime};
use std::cell::Cell;
use std::io;
use std::time::Duration;

thread_local! {
    static HAS_SHORT_SLICES: Cell<bool> = const { Cell::new(false) };
}

/// Lets the calling thread run only while nothing else wants a processor (SCHED_IDLE of sched(7)). Whoever wakes up
/// has the thread's processor at once, and the kernel places threads there as if it were idle; a lower priority alone
/// gives neither. There is no way back.
///
/// # Errors
/// The kernel refuses, in a sandbox that forbids it for example.
pub fn only_in_idle_time() -> io::Result<()> {
    set(libc::SCHED_IDLE, 0, 0)
}

/// Gives the calling thread the processor soon after it wakes up, which suits one that runs for microseconds: its time
/// slices are short, so it need not wait for those of others to end (sched_setattr(2); since Linux 6.12, earlier
/// kernels ignore it). Otherwise that takes up to 4 ms where all processors are busy. It suits one that calls
/// [`let_others_go_first`] too, which gives up what is left of a slice. The threads that it starts have ordinary slices.
///
/// # Errors
/// As [`only_in_idle_time`].
pub fn soon_after_waking() -> io::Result<()> {
    /// The shortest that the kernel takes, in nanoseconds.
    const SLICE: u64 = 100_000;
    set(libc::SCHED_OTHER, libc::SCHED_FLAG_RESET_ON_FORK, SLICE)?;
    HAS_SHORT_SLICES.set(true);
    Ok(())
}

/// Lets threads of the same control group go first that wait for the calling thread's processor (sched_yield(2)). For one
/// that computes for milliseconds: a thread that was woken up on its processor, the server's for example, stays there though
/// another is idle, and would wait until the time slice ends.
///
/// Nothing happens on a thread without short slices: what is left of an ordinary one is milliseconds, and of a nice thread's
/// many times as much.
pub fn let_others_go_first() {
    if HAS_SHORT_SLICES.get() {
        std::thread::yield_now();
    }
}

/// How long the calling thread has computed in its life.
pub fn computed() -> Duration {
    // It cannot be negative.
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

fn set(policy: libc::c_int, flags: libc::c_int, slice: u64) -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).map_err(io::Error::other)?,
        sched_policy: u32::try_from(policy).map_err(io::Error::other)?,
        sched_flags: u64::try_from(flags).map_err(io::Error::other)?,
        // As it is.
        sched_nice: getpriority_process(None)?,
        sched_priority: 0,
        sched_runtime: slice,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel only reads the structure, which says its own size; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
