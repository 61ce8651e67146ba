//! The harness of the shim's tests: a node of its own for each of them, called as a kubelet calls one.
//!
//! | module | what it holds |
//! |---|---|
//! | [`Node`] | a private containerd with all that belongs to it; shows in the end that nothing is left |
//! | [`Pod`], [`Container`] | what a kubelet does with them over CRI, and what the kernel says of their processes |
//! | [`Kubernetes`] | a whole Kubernetes with one node |
//! | [`Image`] | images of the tests' own |
//! | [`cgroup`] | the cgroups of pods |
//! | [`leftovers`] | processes and mounts that should be gone |
//! | [`network`] | a bridge for pods |
//! | [`dns`] | a name server for pods |

pub mod cgroup;
mod container;
pub mod dns;
mod image;
mod kubernetes;
pub mod leftovers;
pub mod network;
mod node;
mod pod;

pub use container::{Container, ContainerBuilder, Line, MASKED};
pub use image::{Image, archive};
pub use kubernetes::Kubernetes;
pub use node::{CRUN, MAILROOM, MAILROOM_CRUN, Node, RUNC, Shim};
pub use pod::{Pod, PodBuilder};

/// Everything that a test of the shim usually needs.
pub mod prelude {
    pub use crate::{Container, Image, Kubernetes, Line, MAILROOM, MAILROOM_CRUN, Node, Pod, RUNC, Shim};
    pub use tests::bed::{Bed, SOON};
    pub use tests::prelude::*;
}
