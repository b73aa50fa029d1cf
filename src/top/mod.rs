//! `tidegate top`: live rates of the networks, as an interactive view or as one plain frame.
//!
//! ```text
//! API ─► Figures ─► Rates: the difference of two ─► Sheets: tables of cells ─┬─► view: interactive
//!                                                                           └─► plain: one frame
//! ```
//!
//! Everything is pure except [`screen`], which owns the terminal, the keys and the clock.

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
