//! `tidegate top`: what happens on the networks now, as a live view or as one plain frame.
//!
//! ```text
//! API ─► Figures ─► Rates: the difference of two ─► Sheets: tables of cells ─┬─► view: a terminal, with keys
//!                                                                           └─► plain: text, once
//! ```
//!
//! All of it is pure but for [`screen`], which has the terminal, the keys and the clock.

mod cell;
mod keys;
mod plain;
mod rates;
pub(crate) mod screen;
mod sheet;
mod state;
mod summary;
mod view;

pub(crate) use plain::frame;
pub(crate) use rates::Rates;
pub(crate) use sheet::{Order, View};
pub(crate) use state::State;
