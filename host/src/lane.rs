//! The slow lane: where guests go on that compute for longer than a turn, so that the acknowledgements, in-progress
//! signals and other messages of their shard go on as well.
//!
//! A shard's lane is a thread that runs only while nothing else wants a processor, started when the first guest needs
//! it, on which a few guests take turns. A guest moves there with its slot, in the middle of its work. When all places
//! are taken, its instance is thrown away and the message waits, without a slot, to be run there from the start: long
//! guests never take the slots that short ones need, and cost their shard no more than one turn each.
//!
//! On a machine that never has a processor to spare such a thread hardly runs. A guest that finds it so most likely
//! misses its deadline; those that come in the next minute, it among them, get a thread that is merely nicer.

use crate::handler::Run;
use crate::scheduling::{computed, only_in_idle_time};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::cell::{Cell, OnceCell};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};

/// The part of its slots that a shard leaves to long guests at most.
const PART: usize = 4;

/// How much the nicer thread is nicer than the others (nice(2)): enough that a shard which has work comes first, and
/// not so much that guests starve there too.
const NICENESS: i32 = 10;

/// A guest starves if it is in the lane for this long and its thread computes for less than a part of that.
const STARVED: (Duration, u32) = (Duration::from_millis(50), 4);

/// How long guests avoid the idle thread after one has starved there.
const AVOIDED: Duration = Duration::from_secs(60);

/// A shard's slow lane.
pub struct SlowLane<C> {
    shard: u32,
    places: Semaphore,
    places_total: usize,
    idle: OnceCell<Thread<C>>,
    nice: OnceCell<Thread<C>>,
    /// When a guest was last found to have starved.
    starved: Cell<Option<Instant>>,
}

struct Thread<C> {
    jobs: mpsc::UnboundedSender<Job<C>>,
    handle: JoinHandle<()>,
}

struct Job<C> {
    call: C,
    done: oneshot::Sender<Done>,
}

struct Done {
    run: Run,
    starved: bool,
}

/// A place in the lane: the right to let one guest go on there.
pub struct Place<'a, C> {
    lane: &'a SlowLane<C>,
    _permit: SemaphorePermit<'a>,
}

impl<C: Future<Output = Run> + Send + 'static> SlowLane<C> {
    /// The lane of the shard with that many slots. Starts nothing yet.
    pub fn new(shard: u32, slots: usize) -> Self {
        let places_total = slots.div_ceil(PART);
        Self {
            shard,
            places: Semaphore::new(places_total),
            places_total,
            idle: OnceCell::new(),
            nice: OnceCell::new(),
            starved: Cell::new(None),
        }
    }

    /// A place, if one is free.
    pub fn try_enter(&self) -> Option<Place<'_, C>> {
        self.places.try_acquire().ok().map(|permit| Place { lane: self, _permit: permit })
    }

    /// A place, when one is free; in the order of asking.
    ///
    /// # Cancel safety
    /// Dropping the future gives up the place in the queue.
    pub async fn enter(&self) -> Option<Place<'_, C>> {
        self.places.acquire().await.ok().map(|permit| Place { lane: self, _permit: permit })
    }

    /// How many guests are in the lane.
    pub fn len(&self) -> usize {
        self.places_total - self.places.available_permits()
    }

    /// The thread for the next guest.
    fn thread(&self) -> std::io::Result<&Thread<C>> {
        if self.starved.get().is_some_and(|at| at.elapsed() < AVOIDED) {
            return Thread::of(&self.nice, format!("slow-lane-{}-nice", self.shard), be_nice);
        }
        Thread::of(&self.idle, format!("slow-lane-{}", self.shard), || {
            if let Err(err) = only_in_idle_time() {
                tracing::debug!("the slow lane takes more than idle time: {err}");
                be_nice();
            }
        })
    }
}

fn be_nice() {
    if let Err(err) = rustix::process::nice(NICENESS) {
        tracing::warn!("the slow lane runs at ordinary priority: {err}");
    }
}

impl<C: Future<Output = Run> + Send + 'static> Thread<C> {
    /// The thread in `cell`, on the runtime of the calling shard: what a guest waits for stays with its shard.
    fn of(cell: &OnceCell<Self>, name: String, prepare: impl FnOnce() + Send + 'static) -> std::io::Result<&Self> {
        if let Some(thread) = cell.get() {
            return Ok(thread);
        }
        let (jobs, queue) = mpsc::unbounded_channel();
        let runtime = Handle::current();
        let handle = std::thread::Builder::new().name(name).spawn(move || {
            prepare();
            runtime.block_on(work(queue));
        })?;
        Ok(cell.get_or_init(|| Self { jobs, handle }))
    }
}

impl<C: Future<Output = Run> + Send + 'static> Place<'_, C> {
    /// Lets the guest go on in the lane, to its end. Nothing, if there can be no thread for it.
    ///
    /// # Cancel safety
    /// Dropping the future ends the instance after its turn.
    pub async fn finish(self, call: C) -> Option<Run> {
        let thread = match self.lane.thread() {
            Ok(thread) => thread,
            Err(err) => {
                tracing::error!("start the thread of the slow lane: {err}");
                return Some(call.await);
            }
        };
        let (done, answer) = oneshot::channel();
        thread.jobs.send(Job { call, done }).ok()?;
        let Done { run, starved } = answer.await.ok()?;
        if starved {
            self.lane.starved.set(Some(Instant::now()));
        }
        Some(run)
    }
}

impl<C> Drop for SlowLane<C> {
    fn drop(&mut self) {
        for Thread { jobs, handle } in [self.idle.take(), self.nice.take()].into_iter().flatten() {
            drop(jobs);
            // It ends after the turn of a guest that nobody waits for any more. Its panic was reported as it happened.
            let _ = handle.join();
        }
    }
}

async fn work(mut queue: mpsc::UnboundedReceiver<Job<impl Future<Output = Run>>>) {
    let mut running = FuturesUnordered::new();
    loop {
        select! {
            biased;
            job = queue.recv() => match job {
                Some(job) => running.push(job.work()),
                None => return,
            },
            Some(()) = running.next() => {}
        }
    }
}

impl<C: Future<Output = Run>> Job<C> {
    async fn work(self) {
        let Self { call, mut done } = self;
        let (began, before) = (Instant::now(), computed());
        select! {
            biased;
            () = done.closed() => {}
            run = call => {
                // Waiting for the host looks the same, and does no harm: the nicer thread serves as well.
                let (there, computed) = (began.elapsed(), computed().saturating_sub(before));
                let starved = there >= STARVED.0 && computed < there / STARVED.1;
                // Whoever waited for it may have gone in the same moment.
                let _ = done.send(Done { run, starved });
            }
        }
    }
}
