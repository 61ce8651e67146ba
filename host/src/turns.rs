//! Guests of a thread take turns. One that computes for long is interrupted, and that costs the others next to nothing.
//!
//! wasmtime interrupts a guest in the next loop or call after the **epoch** of its engine has ticked. It ticks when a
//! timer goes off, which the kernel keeps for each thread with guests. Before a guest gets the processor its thread's
//! timer is set to a [`TICK`] from then, unless it is to go off in more than half of one anyway. So a thread that
//! settles one small message after the other only puts its timer off, two thousand times a second, and a thread that
//! waits for messages has none running. A clock that always ticks has to wake up, and takes the processor from a guest
//! to do so.
//!
//! A single tick may be lost: when a guest goes on after one, wasmtime counts from the epoch of that moment, and another
//! may just have come. So after each the clock looks every [`TICK`] whether the same guest is still at it, and ticks
//! again until it is not.

use crate::scheduling::{computed, soon_after_waking};
use anyhow::{Context, Result};
use futures::FutureExt as _;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use wasmtime::Engine;

/// The longest from the moment a guest gets the processor to its first tick; half of it is the shortest, but for want of
/// timers.
const TICK: Duration = Duration::from_millis(1);

/// How much a guest may compute after the first tick before it has to let others on, in its thread's CPU time: that
/// others had the processor meanwhile is not the guest's doing.
const TURN: Duration = Duration::from_micros(500);

/// The shortest time to set a timer to.
const SHORTEST: Duration = Duration::from_micros(50);

thread_local! {
    /// The turn of the guest that this thread runs now, and what ends it.
    static CURRENT: RefCell<Turn> = const { RefCell::new(Turn { state: State::Fresh, timer: None }) };
}

/// A guest's time on its thread, from one poll to the next.
struct Turn {
    state: State,
    timer: Option<Timer>,
}

#[derive(Clone, Copy)]
enum State {
    /// No tick yet.
    Fresh,
    /// At the first tick, when the thread had computed for this long in its life.
    Ticked(Duration),
    /// Others' turn.
    Over,
}

/// A thread's timer. When it goes off, all engines of the clock tick.
struct Timer {
    clock: Arc<Shared>,
    /// Nothing, if the system has none left: then the clock ticks all the time.
    fd: Option<OwnedFd>,
    /// When it goes off, or went off.
    due: Instant,
    polls: Arc<Polls>,
}

/// How often a thread has begun to poll a guest, and has come to the end of that: odd while it polls. In cache lines of its
/// own, two of which processors fetch at a time.
#[derive(Default)]
#[repr(align(128))]
struct Polls(AtomicU64);

impl Polls {
    /// Only the thread itself may call it.
    fn count(&self) {
        self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

impl Timer {
    fn of(clock: &Arc<Shared>, now: Instant) -> Self {
        let fd = clock.timer().map_err(|err| clock.tick_always(&err)).ok();
        Self { clock: clock.clone(), fd, due: now, polls: clock.watched() }
    }

    fn set(&mut self, now: Instant, after: Duration) {
        let Some(fd) = &self.fd else { return };
        self.due = now + after;
        let it_value = after.try_into().expect("a millisecond fits");
        let once = Itimerspec { it_interval: Timespec::default(), it_value };
        if let Err(err) = timerfd_settime(fd, TimerfdTimerFlags::empty(), &once) {
            self.clock.tick_always(&err.into());
            self.fd = None;
        }
    }

    /// Whether the epochs may have ticked for this thread's guest, and not only for one of another thread.
    fn went_off(&self, now: Instant) -> bool {
        self.fd.is_none() || self.due <= now
    }
}

/// For the moment when the epoch of a guest has ticked: whether the turn is over that it has on this thread.
pub fn tick() -> bool {
    CURRENT.with_borrow_mut(|turn| {
        let Some(timer) = &mut turn.timer else { return false };
        let now = Instant::now();
        if !timer.went_off(now) {
            return false;
        }
        let computed = computed();
        let first = match turn.state {
            State::Fresh => computed,
            State::Ticked(first) => first,
            State::Over => return true,
        };
        let left = TURN.saturating_sub(computed.saturating_sub(first));
        if left.is_zero() {
            turn.state = State::Over;
            return true;
        }
        turn.state = State::Ticked(first);
        timer.set(now, left.max(SHORTEST));
        false
    })
}

/// The guest of this thread is not polled any more.
fn end() {
    CURRENT.with_borrow(|turn| turn.timer.iter().for_each(|timer| timer.polls.count()));
}

/// Whether the guest that this thread ran last still computed when its turn ended, and does not wait for anything.
fn is_over() -> bool {
    CURRENT.with_borrow(|turn| matches!(turn.state, State::Over))
}

/// What comes of `call`, unless the guest computes for longer than a turn at a stretch: nothing then, and the call goes
/// on where it was when it is polled again. However long a guest waits for the host, that is no turn.
///
/// # Cancel safety
/// Dropping the future loses nothing: the call is where it was.
pub async fn turn<T>(call: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
    poll_fn(|context| match call.poll_unpin(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending if is_over() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// Lets the epochs of its engines tick for the guests that compute for long.
#[derive(Clone)]
pub struct Clock(Arc<Running>);

struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    engines: Mutex<Vec<Engine>>,
    /// All timers and `wake`.
    events: OwnedFd,
    wake: OwnedFd,
    threads: Mutex<Vec<Watched>>,
    ticks_always: AtomicBool,
    stopped: AtomicBool,
}

/// A thread, and how far it was when the clock last looked.
struct Watched {
    polls: Weak<Polls>,
    seen: u64,
}

impl Clock {
    /// A clock that has no engine yet.
    ///
    /// # Errors
    /// The system has no thread or no file descriptor left.
    pub fn start() -> Result<Self> {
        let shared = Arc::new(Shared::new().context("make the clock of the epochs")?);
        let thread = std::thread::Builder::new()
            .name("epoch".into())
            .spawn({
                let shared = shared.clone();
                move || {
                    if let Err(err) = soon_after_waking() {
                        tracing::debug!("the epoch may tick late on a busy machine: {err}");
                    }
                    shared.run();
                }
            })
            .context("start the epoch's thread")?;
        Ok(Self(Arc::new(Running { shared, thread: Some(thread) })))
    }

    /// From now on the epoch of this engine ticks too.
    pub fn add(&self, engine: Engine) {
        self.0.shared.engines().push(engine);
    }

    /// Drives `call`, of a guest in this engine of the clock, unless it still waits for the host when `deadline` has passed
    /// since `started`, which is now.
    ///
    /// A guest that computes, or waits for its next turn to compute, is left to its epoch, which interrupts it then and
    /// knows where it was. tokio's timer is only made at the first wait, so a guest that never waits costs none. One that
    /// waits often may never see its thread's timer go off, and is looked at when it goes on.
    ///
    /// # Cancel safety
    /// As that of `call`.
    pub async fn within<T>(
        &self,
        engine: &Engine,
        deadline: Duration,
        started: Instant,
        mut call: Pin<&mut impl Future<Output = T>>,
    ) -> Option<T> {
        let mut late = pin!(None);
        let mut looked = started;
        let mut is_first = true;
        poll_fn(|context| {
            let now = if is_first { started } else { Instant::now() };
            is_first = false;
            if now.saturating_duration_since(looked) >= TICK {
                engine.increment_epoch();
                looked = now;
            }
            self.begin(now);
            let polled = call.as_mut().poll(context);
            end();
            if let Poll::Ready(value) = polled {
                return Poll::Ready(Some(value));
            }
            if is_over() {
                return Poll::Pending;
            }
            if late.is_none() {
                // Two ticks of grace, for a guest that computes again by then.
                let at = started + deadline + 2 * TICK;
                late.set(Some(tokio::time::sleep_until(at.into())));
            }
            match late.as_mut().as_pin_mut() {
                Some(late) => late.poll(context).map(|()| None),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Begins the turn of a guest on this thread.
    fn begin(&self, now: Instant) {
        let clock = &self.0.shared;
        CURRENT.with_borrow_mut(|turn| {
            turn.state = State::Fresh;
            let timer = match &mut turn.timer {
                Some(timer) if Arc::ptr_eq(&timer.clock, clock) => timer,
                other => other.insert(Timer::of(clock, now)),
            };
            timer.polls.count();
            if timer.due.saturating_duration_since(now) < TICK / 2 {
                timer.set(now, TICK);
            }
        });
    }
}

impl Shared {
    fn new() -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC)?;
        epoll::add(&events, &wake, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            engines: Mutex::default(),
            events,
            wake,
            threads: Mutex::default(),
            ticks_always: AtomicBool::default(),
            stopped: AtomicBool::default(),
        })
    }

    fn engines(&self) -> MutexGuard<'_, Vec<Engine>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A timer that this clock listens to as long as it is open. Each time that it goes off is one event: nobody reads
    /// how often it did.
    fn timer(&self) -> io::Result<OwnedFd> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        epoll::add(&self.events, &timer, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        Ok(timer)
    }

    /// Counts the polls of one more thread, which is looked at until it lets go of them.
    fn watched(&self) -> Arc<Polls> {
        let polls = Arc::<Polls>::default();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| thread.polls.strong_count() > 0);
        threads.push(Watched { polls: Arc::downgrade(&polls), seen: 0 });
        polls
    }

    /// Whether any thread polls a guest, and whether one has polled the same since the last look.
    fn look(&self) -> (bool, bool) {
        let (mut any, mut same) = (false, false);
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            let now = thread.polls.upgrade().map_or(0, |polls| polls.0.load(Ordering::Acquire));
            let polls = now % 2 == 1;
            any |= polls;
            same |= polls && now == thread.seen;
            thread.seen = now;
        }
        (any, same)
    }

    /// For want of a timer.
    fn tick_always(&self, why: &io::Error) {
        if !self.ticks_always.swap(true, Ordering::SeqCst) {
            tracing::warn!(
                "no timer for a thread: {why}; the epochs tick every {TICK:?} from now on, which costs some CPU"
            );
        }
        self.wake();
    }

    fn wake(&self) {
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes()).expect("a counter of its own, far from its end");
    }

    fn run(&self) {
        let tick = TICK.try_into().expect("a millisecond fits");
        let mut events = Vec::with_capacity(8);
        let mut is_watching = false;
        while !self.stopped.load(Ordering::SeqCst) {
            let always = self.ticks_always.load(Ordering::SeqCst);
            events.clear();
            let waited =
                epoll::wait(&self.events, spare_capacity(&mut events), (always || is_watching).then_some(&tick));
            let failed = waited.is_err_and(|err| err != Errno::INTR);
            if failed {
                std::thread::sleep(TICK);
            }
            let is_called = always || failed || !events.is_empty();
            let (any, same) = self.look();
            if is_called || same {
                self.engines().iter().for_each(Engine::increment_epoch);
            }
            is_watching = if is_called { any } else { same };
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(all(test, feature = "compile"))]
mod tests {
    use super::*;

    fn clock() -> (Clock, Engine) {
        let engine = Engine::new(&crate::engine::config()).expect("an engine");
        let clock = Clock::start().expect("a clock");
        clock.add(engine.clone());
        (clock, engine)
    }

    /// Counts down for some ten seconds, as a guest would that has too much to do.
    const ENDLESS: &str = r#"
        (module
            (func (export "count") (local $left i64)
                (local.set $left (i64.const 20_000_000_000))
                (loop $more
                    (local.set $left (i64.sub (local.get $left) (i64.const 1)))
                    (br_if $more (i64.gt_s (local.get $left) (i64.const 0))))))
    "#;

    /// Whether a guest that computes is interrupted when its turn is over, and not before. It goes on so long after a tick.
    fn is_interrupted(clock: &Clock, engine: &Engine, late: Duration) -> bool {
        let mut store = wasmtime::Store::new(engine, ());
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |_| {
            let is_over = tick();
            std::thread::sleep(late);
            Ok(if is_over { wasmtime::UpdateDeadline::Interrupt } else { wasmtime::UpdateDeadline::Continue(1) })
        });
        let module = wasmtime::Module::new(engine, wat::parse_str(ENDLESS).expect("text")).expect("a module");
        let instance = wasmtime::Instance::new(&mut store, &module, &[]).expect("an instance");
        let count = instance.get_typed_func::<(), ()>(&mut store, "count").expect("a function");
        let before = computed();
        clock.begin(Instant::now());
        let is_interrupted = count.call(&mut store, ()).is_err() && is_over();
        end();
        is_interrupted && (TURN..TURN * 1000).contains(&(computed() - before))
    }

    /// A thread that has no timer is not left alone with a guest that computes for ever.
    #[test]
    fn turns_end_with_timers_and_without() {
        let (clock, engine) = clock();
        assert!(is_interrupted(&clock, &engine, Duration::ZERO));
        clock.0.shared.tick_always(&io::Error::other("as if there were none left"));
        CURRENT.with_borrow_mut(|turn| turn.timer.as_mut().expect("it was set").fd = None);
        assert!(is_interrupted(&clock, &engine, Duration::ZERO));
    }

    /// wasmtime counts from the epoch there is when a guest goes on: ticks that came before are lost.
    #[test]
    fn a_lost_tick_is_followed_by_another() {
        let (clock, engine) = clock();
        assert!(is_interrupted(&clock, &engine, 3 * TICK));
    }

    /// As long as guests begin one after the other, the timer is put off.
    #[test]
    fn a_timer_is_put_off_by_the_next_guest() {
        let (clock, _) = clock();
        let due = || CURRENT.with_borrow(|turn| turn.timer.as_ref().expect("it was set").due);
        let start = Instant::now();
        clock.begin(start);
        assert_eq!(due(), start + TICK);
        clock.begin(start + TICK / 2);
        assert_eq!(due(), start + TICK, "it is far enough away");
        clock.begin(start + TICK / 2 + Duration::from_micros(1));
        assert_eq!(due(), start + TICK / 2 + Duration::from_micros(1) + TICK);
    }

    /// However late it is, a guest whose turn is over has not waited for the host; one that waits is given up.
    #[test]
    fn only_a_guest_that_waits_for_the_host_is_given_up() {
        let (clock, engine) = clock();
        let driven = |end_of_poll: State| {
            let mut polls = 0;
            let call = poll_fn(move |context| {
                polls += 1;
                CURRENT.with_borrow_mut(|turn| turn.state = end_of_poll);
                context.waker().wake_by_ref();
                if polls < 10 { Poll::Pending } else { Poll::Ready(()) }
            });
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            runtime.block_on(clock.within(&engine, Duration::ZERO, Instant::now() - Duration::from_secs(1), pin!(call)))
        };
        assert_eq!(driven(State::Over), Some(()));
        assert_eq!(driven(State::Fresh), None);
    }
}
