//! The guests of a shard that are ready to run do so one after the other, before the verdict of the first is published.
//!
//! A run and a publication each need so much code and data that one drives the other out of the nearest caches of the
//! processor. Done in turns, message by message, both take a tenth longer, a sixth with larger messages.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// The messages of a shard whose guests are done while others are still to run.
#[derive(Default)]
pub struct Batch {
    waiting: RefCell<Vec<Waker>>,
}

impl Batch {
    /// Waits until no other guest is ready to run; whoever polls the guests says so with [`Batch::release`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing but a wake-up for nothing.
    pub async fn complete(&self) {
        let mut waits = false;
        poll_fn(|context| {
            if waits {
                return Poll::Ready(());
            }
            waits = true;
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Lets those go on that wait. Whether there were any.
    pub fn release(&self) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        let any = !waiting.is_empty();
        waiting.drain(..).for_each(Waker::wake);
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[test]
    fn those_who_wait_go_on_together() {
        let batch = Batch::default();
        let (mut one, mut other) = (Box::pin(batch.complete()), Box::pin(batch.complete()));
        assert!(!batch.release(), "nobody waits yet");
        assert!(one.as_mut().now_or_never().is_none() && other.as_mut().now_or_never().is_none());
        assert!(batch.release() && !batch.release());
        assert!(one.now_or_never().is_some() && other.now_or_never().is_some());
    }
}
