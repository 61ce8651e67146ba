//! Learns from labelled mails who takes which, and measures how good that is.
//!
//! Reading order: [`corpus`] (mails and their labels), [`learn`] (a model of them), [`score`] (how good it is). The
//! program `train` writes a model; `quality` measures all that the triage does on real mail.

pub mod corpus;
pub mod learn;
pub mod score;
