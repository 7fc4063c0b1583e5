// The chats, in this browser's database and in memory. What is kept is bounded, in characters of JSON.

const DATABASE = "sapwood";
const CHATS = "chats";
export const MAX_CHARACTERS = 20_000_000;

/** Why a chat was not kept, in words for the user. */
export class NotKept extends Error {}

/**
 * Open the database and read all chats.
 * changed  called after another tab has changed a chat
 */
export async function openStore(changed, maxCharacters = MAX_CHARACTERS) {
  const chats = new Map();
  const sizes = new Map();
  const others = new BroadcastChannel(DATABASE);
  let database = null;
  let whyNot = null;
  try {
    database = await request(openDatabase());
    for (const chat of await request(reading(database).getAll())) remember(chat);
  } catch (error) {
    whyNot = error.message;
  }
  others.onmessage = async ({ data: id }) => {
    const chat = await request(reading(database).get(id));
    if (chat) remember(chat);
    else forget(id);
    changed(id);
  };

  function remember(chat) {
    chats.set(chat.id, chat);
    sizes.set(chat.id, JSON.stringify(chat).length);
  }
  function forget(id) {
    chats.delete(id);
    sizes.delete(id);
  }
  const used = () => [...sizes.values()].reduce((sum, size) => sum + size, 0);

  return {
    chats,
    /** Part of the room that is taken, from 0 to 1. */
    fullness: () => used() / maxCharacters,
    /** Keep a chat as it is now. It stays in memory even if NotKept is raised. */
    async put(chat) {
      remember(chat);
      if (!database) {
        throw new NotKept(`This browser keeps no history (${whyNot}): chats end with this page.`);
      }
      if (used() > maxCharacters) {
        const limit = Math.round(maxCharacters / 1e6);
        throw new NotKept(
          `The history is full (${limit} MB): this chat ends with this page. ` +
            "Export and delete older chats to make room.",
        );
      }
      try {
        await merge(database, chat);
      } catch (error) {
        throw new NotKept(`The browser did not keep this chat: ${error.message}`);
      }
      others.postMessage(chat.id);
    },
    /** The same for a page that is being closed, where no answer comes any more. */
    putLast(chat) {
      if (!database || used() > maxCharacters) return;
      const store = writing(database);
      store.put(chat);
      store.transaction.commit();
    },
    async delete(id) {
      forget(id);
      if (!database) return;
      await request(writing(database).delete(id));
      others.postMessage(id);
    },
  };
}

/** Write a chat, with the messages that another tab may have added in the meantime. */
async function merge(database, chat) {
  const store = writing(database);
  const before = await request(store.get(chat.id));
  const known = new Set(chat.messages.map((message) => message.id));
  const added = (before?.messages ?? []).filter((message) => !known.has(message.id));
  chat.messages.push(...added);
  await request(store.put(chat));
}

function openDatabase() {
  const opening = indexedDB.open(DATABASE, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(CHATS, { keyPath: "id" });
  return opening;
}

const reading = (database) => database.transaction(CHATS).objectStore(CHATS);
const writing = (database) => database.transaction(CHATS, "readwrite").objectStore(CHATS);

const request = (asked) =>
  new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
