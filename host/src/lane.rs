//! The slow lane: where guests go on that compute for longer than a turn, so that the acknowledgements, in-progress
//! signals and other messages of their shard go on as well.
//!
//! A shard's lane is one thread of low priority, started when the first guest needs it, on which a few guests take
//! turns. A guest moves there with its slot, in the middle of its work. When all places are taken, its instance is
//! thrown away and the message waits, without a slot, to be run there from the start: long guests never take the
//! slots that short ones need, and cost their shard no more than one turn each.

use crate::handler::Run;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::cell::OnceCell;
use std::thread::JoinHandle;
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};

/// The part of its slots that a shard leaves to long guests at most.
const PART: usize = 4;

/// How much the lane's thread is nicer than the others (nice(2)): enough that a shard which has work comes first,
/// and not so much that a lane starves beside busy shards.
const NICENESS: i32 = 10;

/// A shard's slow lane.
pub struct SlowLane<C> {
    name: String,
    places: Semaphore,
    places_total: usize,
    thread: OnceCell<Thread<C>>,
}

struct Thread<C> {
    jobs: mpsc::UnboundedSender<Job<C>>,
    handle: JoinHandle<()>,
}

struct Job<C> {
    call: C,
    done: oneshot::Sender<Run>,
}

/// A place in the lane: the right to let one guest go on there.
pub struct Place<'a, C> {
    lane: &'a SlowLane<C>,
    _permit: SemaphorePermit<'a>,
}

impl<C: Future<Output = Run> + Send + 'static> SlowLane<C> {
    /// The lane of the shard with that many slots. Starts nothing yet.
    pub fn new(shard: usize, slots: usize) -> Self {
        let places_total = slots.div_ceil(PART);
        Self {
            name: format!("slow-lane-{shard}"),
            places: Semaphore::new(places_total),
            places_total,
            thread: OnceCell::new(),
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

    /// The lane's thread, on the runtime of the calling shard: what a guest waits for stays with its shard.
    fn thread(&self) -> std::io::Result<&Thread<C>> {
        if let Some(thread) = self.thread.get() {
            return Ok(thread);
        }
        let (jobs, queue) = mpsc::unbounded_channel();
        let runtime = Handle::current();
        let handle = std::thread::Builder::new().name(self.name.clone()).spawn(move || {
            if let Err(err) = rustix::process::nice(NICENESS) {
                tracing::warn!("the slow lane runs at ordinary priority: {err}");
            }
            runtime.block_on(work(queue));
        })?;
        Ok(self.thread.get_or_init(|| Thread { jobs, handle }))
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
        let (done, run) = oneshot::channel();
        thread.jobs.send(Job { call, done }).ok()?;
        run.await.ok()
    }
}

impl<C> Drop for SlowLane<C> {
    fn drop(&mut self) {
        if let Some(Thread { jobs, handle }) = self.thread.take() {
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
        select! {
            biased;
            () = done.closed() => {}
            run = call => {
                // Whoever waited for it may have gone in the same moment.
                let _ = done.send(run);
            }
        }
    }
}
