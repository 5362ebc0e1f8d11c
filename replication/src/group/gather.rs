//! Gathering: whoever waits while a round is under way shares the next one.

use tokio::sync::mpsc;

/// Takes the first item, waiting for it, and whatever else is there, up to `limit` in `size`.
pub async fn gather<T>(
    queue: &mut mpsc::Receiver<T>,
    into: &mut Vec<T>,
    limit: usize,
    size: impl Fn(&T) -> usize,
) -> bool {
    let Some(first) = queue.recv().await else {
        return false;
    };
    let mut total = size(&first);
    into.push(first);
    while total < limit {
        let Ok(item) = queue.try_recv() else { break };
        total += size(&item);
        into.push(item);
    }
    true
}
